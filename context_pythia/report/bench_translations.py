"""What the report of `bench` says, in each language: one table of the same keys and placeholders for all."""

BENCH_TRANSLATIONS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Context-Pythia bench: {what}",
        "decode": "prefill, decoding, memory",
        "train": "training steps",
        "how": "Times are medians of at most {rounds} rounds, the smallest and largest in brackets; warm-up is left "
        "out. In every round all models take their turn (A B A B …), and ratios are medians of the rounds' own "
        "ratios. {device}, {threads} CPU threads; compiled are only the rows that say so.",
        "cell": "Batch {batch}, {length} tokens",
        "cell_note": "Prefill: all tokens into an empty cache. Decoding: the last {new_tokens} tokens up to that "
        "length, by generate() and by the bare forward, from a cache filled with random numbers; ms a token of all "
        "sequences. A cache that grows in place has its room already, as it has in all but a few of its steps. × "
        "Dynamic and × Static: how many times as fast as {peer} with that cache (× time: how many times as long the "
        "prefill takes as with DynamicCache). Cache: measured on the one that generate() filled; 1 MB = 1,024 × 1,024 "
        "bytes. Peak: weights, cache and what generate() took besides, prefill included; on a CPU that is the "
        "process's resident memory, whose high-water mark is set back before each model. Weights and cache in "
        "{dtype}, attention by {attention}.",
        "model": "Model",
        "prefill": "Prefill, s",
        "prefill_ratio": "× time",
        "forward": "Forward, ms/token",
        "generate": "generate(), ms/token",
        "dynamic": "× Dynamic",
        "static": "× Static",
        "rate": "Tokens/s",
        "cache": "Cache, MB",
        "reduction": "Reduction",
        "peak": "Peak, MB",
        "memory": "Conversations of {length} tokens in {gb} GB",
        "memory_note": "Computed, not run: what {gb} GB (of 1,024³ bytes) leave beside the weights, divided by the "
        "measured bytes of one conversation's cache. Growth reserve is what a cache holds for tokens to come.",
        "parameters": "Parameters",
        "weights": "Weights, MB",
        "conversation": "A conversation, MB",
        "slack": "Growth reserve, MB",
        "fit": "Conversations",
        "fit_with_slack": "With the reserve",
        "fit_tokens": "Tokens in all",
        "crossover": "From which length a smaller cache is faster",
        "batch": "Batch",
        "crossover_length": "Faster than every GPT-NeoX from",
        "about": "about {length} tokens",
        "always": "{length} tokens on, the shortest measured",
        "never": "not up to {length} tokens",
        "crossover_note": "Decoding through generate(), medians; between two measured lengths it is interpolated "
        "(logarithmically).",
        "decode_caption": "Decoding time against the tokens in the cache; a star marks where a model becomes faster "
        "than every GPT-NeoX.",
        "memory_caption": "Memory at batch {batch} and {length} tokens: weights, measured cache, and the rest up to "
        "the peak.",
        "failure": "{name}: {error}",
        "train_note": "Recipe “{recipe}”: {tokens} tokens a step, on made-up tokens, by phase 2's own Trainer; "
        "“{plain}” is a plain loop with all logits in fp32, not fused and not compiled. Each model trains in a "
        "process of its own; its peak is that process's, libraries included ({empty} MB before the model). The "
        "machine's matrix rate is that of the baseline's own products alone, measured in every round: {rates}. Share: "
        "the step's useful operations a second in that of the model's precision.",
        "precision": "Precision",
        "step": "Step, s",
        "speed": "× plain",
        "overhead": "Against baseline",
        "share": "Share of rate",
        "parts": "Where the time of a step goes, in seconds",
        "body": "Body",
        "head_and_loss": "Head, loss",
        "context_block": "ContextBlock",
        "backward": "Backward",
        "optimizer": "Optimizer",
        "rest": "Rest",
        "parts_note": "Means. Body: forward alone. Head and loss: forward, and with phase 2's Trainer backward too, "
        "chunk by chunk. ContextBlock: its forward and backward, which body and backward do not count. Optimizer: "
        "clipping included.",
        "parts_caption": "Seconds of a training step by part.",
        "provenance": "Where it ran",
        "item": "Item",
        "value": "Value",
    },
    "ja": {
        "title": "Context-Pythia ベンチマーク：{what}",
        "decode": "プリフィル・デコード・メモリ",
        "train": "学習ステップ",
        "how": "時間は最大 {rounds} ラウンドの中央値で、括弧内は最小値と最大値です。ウォームアップは含みません。"
        "各ラウンドで全モデルが順番に（A B A B …）実行され、比は同じラウンド内の比の中央値です。{device}、CPU "
        "スレッド数 {threads}、コンパイルは明記した行のみ。",
        "cell": "バッチ {batch}、{length} トークン",
        "cell_note": "プリフィル：空のキャッシュへ全トークンを入力。デコード：その長さまでの最後の {new_tokens} "
        "トークンを、乱数で埋めたキャッシュから generate() と素の forward で実行した時間（全系列分の 1 "
        "トークンあたりミリ秒）。その場で拡張するキャッシュは、拡張が済んだ状態（ほとんどのステップの状態）で"
        "測っています。× Dynamic と × Static は、そのキャッシュを使う {peer} に対する速度の倍率です（× 時間は "
        "DynamicCache に対するプリフィル時間の倍率）。キャッシュは generate() が実際に埋めたものの実測値（1 MB = "
        "1,024 × 1,024 バイト）。ピークは重みとキャッシュ、およびプリフィルを含む generate() の作業メモリで、CPU では"
        "プロセスの常駐メモリの最高値をモデルごとにリセットして測っています。重みとキャッシュは {dtype}、"
        "アテンションは {attention}。",
        "model": "モデル",
        "prefill": "プリフィル（秒）",
        "prefill_ratio": "× 時間",
        "forward": "forward（ms/トークン）",
        "generate": "generate()（ms/トークン）",
        "dynamic": "× Dynamic",
        "static": "× Static",
        "rate": "トークン/秒",
        "cache": "キャッシュ（MB）",
        "reduction": "削減率",
        "peak": "ピーク（MB）",
        "memory": "{gb} GB に収まる {length} トークンの会話数",
        "memory_note": "実行ではなく計算値です。{gb} GB（1 GB = 1,024³ バイト）から重みを除いた残りを、1 "
        "会話分のキャッシュの実測バイト数で割っています。予約領域は、"
        "今後のトークンのためにキャッシュが確保しているメモリです。",
        "parameters": "パラメータ数",
        "weights": "重み（MB）",
        "conversation": "1 会話（MB）",
        "slack": "予約領域（MB）",
        "fit": "会話数",
        "fit_with_slack": "予約領域込み",
        "fit_tokens": "総トークン数",
        "crossover": "小さいキャッシュのほうが速くなる長さ",
        "batch": "バッチ",
        "crossover_length": "すべての GPT-NeoX より速くなる長さ",
        "about": "約 {length} トークン",
        "always": "測定した最短の {length} トークンから",
        "never": "{length} トークンまででは速くならない",
        "crossover_note": "generate() によるデコードの中央値。測定した長さの間は対数で補間しています。",
        "decode_caption": "キャッシュ内のトークン数に対するデコード時間。星印は、すべての GPT-NeoX より速くなる点で"
        "す。",
        "memory_caption": "バッチ {batch}、{length} トークンでのメモリ：重み、実測のキャッシュ、ピークまでの残り。",
        "failure": "{name}：{error}",
        "train_note": "レシピ「{recipe}」、1 ステップ {tokens} トークン（乱数のトークン）、Phase 2 の Trainer "
        "そのもので実行。「{plain}」は全ロジットを fp32 で計算する素朴なループで、融合もコンパイルもしていません。"
        "モデルごとに別のプロセスで学習し、ピークはそのプロセス全体の値です（ライブラリを含み、モデル構築前は {empty} "
        "MB）。行列積の速度はベースラインの行列積だけを毎ラウンド測った値です：{rates}。割合は、"
        "ステップに必要な演算の毎秒の量を、同じ精度の行列積の速度で割ったものです。",
        "precision": "数値精度",
        "step": "ステップ（秒）",
        "speed": "× plain",
        "overhead": "ベースライン比",
        "share": "速度の割合",
        "parts": "1 ステップの時間の内訳（秒）",
        "body": "本体",
        "head_and_loss": "出力層と損失",
        "context_block": "ContextBlock",
        "backward": "逆伝播",
        "optimizer": "オプティマイザー",
        "rest": "その他",
        "parts_note": "平均値。本体は順伝播のみです。出力層・損失は順伝播で、フェーズ 2 の Trainer では"
        "分割して同時に計算する逆伝播も含みます。ContextBlock は順伝播と逆伝播の両方で、"
        "本体と逆伝播には含めていません。オプティマイザーには勾配クリッピングを含みます。",
        "parts_caption": "学習ステップの時間の内訳（秒）。",
        "provenance": "実行環境",
        "item": "項目",
        "value": "値",
    },
}
