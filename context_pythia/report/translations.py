"""What the report says, in each language: one table of the same keys and placeholders for all.

Log lines, errors and the labels in pictures stay English, as the console prints them.
"""

TRANSLATIONS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Context-Pythia report, recipe “{recipe}”",
        "best": "Of the models with a smaller cache than {baseline}, {name} has the best perplexity: {ppl} against "
        "{base_ppl}, a difference of {change}. Its KV cache measures {kb} in place of {base_kb} at {length} tokens in "
        "{dtype}, a reduction of {reduction}.",
        "smallest": "The smallest cache, that of {name}, measures {kb}, a reduction of {reduction}, at perplexity "
        "{ppl}, a difference of {change}.",
        "none_smaller": "No finished context model caches less than the baseline {baseline}, whose perplexity is "
        "{base_ppl} with a measured KV cache of {base_kb} at {length} tokens in {dtype}.",
        "no_baseline": "{name} has the best perplexity, {ppl}, with a measured KV cache of {kb} at {length} tokens in "
        "{dtype}. There is no finished baseline to compare it with.",
        "made_elsewhere": "{name}, which is made of {baseline}, takes its perplexity from {base_ppl} to {ppl} "
        "({change}), with a measured KV cache of {kb} at {length} tokens in {dtype}. {baseline} has its own report.",
        "nothing": "No model of this run has a result yet.",
        "unfinished": "The run is incomplete: {done} of {total} models have a result (failed: {failed}, not run yet: "
        "{pending}).",
        "failure": "{name} failed: {error}",
        "failed": "failed",
        "pending": "not run yet",
        "yes": "yes",
        "no": "no",
        "settings": "Settings",
        "setting": "Setting",
        "value": "Value",
        "data_source": "Data",
        "documents": "Documents, training / validation",
        "samples": "Samples, training / validation",
        "sequence_length": "Sequence length",
        "tokens": "{length} tokens ({with_target} with the target)",
        "tokenizer": "Tokenizer",
        "vocabulary": "Vocabulary",
        "architecture": "Architecture",
        "body": "{layers} layers of width {hidden}, {heads} heads, MLP of width {mlp}",
        "dropout": "Dropout",
        "dropout_value": "{hidden} (hidden), {attention} (attention weights)",
        "epochs": "Epochs at most",
        "batch": "Batch size",
        "accumulated": "{batch} × {accumulation} accumulated",
        "learning_rate": "Learning rate (AdamW)",
        "weight_decay": "Weight decay",
        "schedule": "Schedule",
        "warmup": "{schedule}, warm-up over {warmup} of the steps",
        "precision": "Precision",
        "patience": "Patience",
        "patience_value": "{patience} (evaluations without a better perplexity before training stops)",
        "seed": "Seed",
        "p1_iterations": "Phase 1: iterations at most",
        "p1_wanted": "Phase 1: convergence rate wanted",
        "p1_wanted_value": "{rate} of tokens, moved less than {threshold} (mean squared)",
        "p1_learning_rate": "Phase 1: learning rate (Adam)",
        "p1_batch": "Phase 1: tokens a batch",
        "p1_noise": "Phase 1: noise",
        "p1_state": "Phase 1: dtype of the contexts",
        "heal_steps": "Healing: steps",
        "heal_parameters": "Healing: parameters trained",
        "heal_ce_weight": "Healing: weight of the text's cross-entropy",
        "heal_learning_rate": "Healing: learning rate (AdamW)",
        "heal_schedule": "Healing: schedule",
        "heal_batch_size": "Healing: samples a batch",
        "heal_precision": "Healing: precision",
        "results": "Results",
        "model": "Model",
        "context": "Context",
        "baseline": "baseline",
        "sharing": "{source} {dim}, shared by {layers} layers",
        "converted": "{source} {dim}, converted",
        "control": "control: baseline, healed",
        "parameters": "Parameters, trained / all",
        "best_ppl": "Best PPL",
        "best_epoch": "Best epoch",
        "accuracy": "Accuracy",
        "measured": "KV cache",
        "formula": "KV cache by formula",
        "reduction": "Reduction",
        "change": "Against baseline",
        "seconds_epoch": "s/epoch",
        "overhead": "Overhead",
        "results_note": "PPL and accuracy: over all validation tokens, at the best epoch. KV cache: measured on a "
        "cache that generate() filled with {length} tokens in {dtype}, batch 1; 1 KB = 1,024 bytes. Differences and "
        "reduction: against the baseline. s/epoch: the epochs' median. Overhead: that against the baseline's, phase 1 "
        "not counted.",
        "timed_elsewhere": "{name} has no overhead: its seconds are those of another machine or another number of "
        "threads than the baseline's ({device}, {processes} × {threads} threads).",
        "healed_note": "Models that go on from the trained {baseline}: {steps} steps on the same text, taught by "
        "{baseline}'s predictions, too. Their best epoch is that of {baseline} plus the epochs since.",
        "healed_by_text_note": "Models that go on from the trained {baseline}: {steps} steps on the same text. Their "
        "best epoch is that of {baseline} plus the epochs since.",
        "control_note": "{control} is {baseline} itself, not converted and trained on in the same way: what the longer "
        "training is worth without a smaller cache.",
        "against_control": "{name} against the control {control}: {change}.",
        "input_note": "The context source “input” has the baseline's cache: its contexts replace the token "
        "embeddings, and the attention layers behind them still cache full keys and values. The “1536.0 KB” of the "
        "original report was a formula; what is shown here was measured.",
        "frontier_caption": "Best validation perplexity against the measured KV cache; the dashed line joins the "
        "models that no other beats in both; an arrow is a model beyond the axis.",
        "cache": "The cache in numbers",
        "numbers": "Numbers a token",
        "bytes_measured": "Bytes, measured",
        "bytes_formula": "Bytes, by formula",
        "slack": "Growth reserve, bytes",
        "cache_note": "Growth reserve is memory that a cache holds for tokens to come; it is shown apart from the "
        "measured bytes.",
        "positions": "Quality by position",
        "positions_note": "Perplexity at these positions of a sample: at position p the next token is predicted from "
        "p + 1 tokens. The last line counts the tokens; weighed by them, the mean log-perplexity of a line is that of "
        "all tokens.",
        "positions_change": "In brackets: against {baseline}.",
        "positions_tokens": "tokens",
        "positions_console": "Perplexity by position in the sample:",
        "positions_caption": "Perplexity by position in the sample, all bands equally wide, and with a baseline the "
        "difference to it.",
        "curves": "Learning curves",
        "curves_caption": "Validation perplexity, with a baseline the difference to it, and training loss by epoch.",
        "curves_phase1_caption": "Validation perplexity, with a baseline the difference to it, and training loss by "
        "epoch; phase 1's share of converged tokens by iteration (dotted: wanted).",
        "phase1": "Phase 1 (OACD)",
        "phase1_intro": "Phase 1 trains the ContextBlock alone until the wanted share of tokens hardly moves from "
        "one iteration to the next. The effective rank is that of contexts of held-out tokens.",
        "iterations": "Iterations",
        "reached": "Convergence reached",
        "wanted": "Wanted",
        "met": "Met",
        "rank": "Effective rank",
        "rank_value": "{rank} of {dim}",
        "seconds": "Seconds",
        "convergence_by_iteration": "Converged tokens by iteration, in percent (first iteration of the line in front):",
        "provenance": "Where it ran",
        "device": "Device",
        "platform": "Platform",
        "threads": "CPU threads",
        "versions": "Versions",
        "commit": "Commit",
        "created": "Created",
        "fingerprint": "Data fingerprint",
        "command": "Command",
        "earlier": "Earlier calls that trained models of this folder (metrics.json has each model's machine, "
        "provenance.json their commits and versions):",
        "eval_title": "Models side by side",
        "eval_best": "Of the caches smaller than that of {first}, {name} costs least: {kb} a sequence in place of "
        "{first_kb} ({reduction} less, measured) at perplexity {ppl} against {first_ppl}, {change}.",
        "eval_none_smaller": "No cache here is smaller than that of {first}, whose perplexity is {ppl}.",
        "eval_model": "model",
        "eval_ppl": "PPL",
        "eval_change": "change",
        "eval_accuracy": "accuracy",
        "eval_cached_ppl": "PPL by token",
        "eval_cached_change": "change by token",
        "eval_cache": "KV cache",
        "eval_reduction": "reduction",
        "eval_kl": "KL",
        "eval_agreement": "same top-1",
        "eval_difference": "largest logit difference",
        "eval_note": "PPL and accuracy: one parallel pass over all {tokens} validation tokens. PPL by token: token by "
        "token through the cache, over the first {cached_tokens} of them. KV cache: bytes of one sequence of {length} "
        "tokens in {dtype}, measured in the cache which that pass filled; 1 KB = 1,024 bytes. Change, reduction, KL "
        "(KL({first} || model), nats a token) and share of equal top-1 tokens: against {first}; KL and top-1 with a "
        "quantised cache by the token-by-token pass.",
        "eval_agree": "Parallel and token by token, every model has the same perplexity on the same {cached_tokens} "
        "tokens, to 4 digits.",
        "eval_disagree": "Parallel and token-by-token perplexity on the same {cached_tokens} tokens differ within 4 "
        "digits: {found}.",
        "eval_quantised": "Quantised caches: transformers' HQQ backend, groups of at most 64 numbers of one token, "
        "residual length {residual} (so many tokens wait unquantised until they are quantised together). Their "
        "bytes are all that they hold: packed integers, scales, zero points and tokens not yet quantised.",
        "eval_caption": "Perplexity of all tokens (of a quantised cache: that of its model without, times the change "
        "found token by token over {cached_tokens} tokens) against the measured cache of one sequence of {length} "
        "tokens; the dashed line joins what nothing else beats in both; an arrow is a model beyond the axis.",
        "eval_tasks": "Tasks of lm-evaluation-harness",
    },
    "ja": {
        "title": "Context-Pythia レポート（レシピ「{recipe}」）",
        "best": "{baseline} よりキャッシュが小さいモデルのうち、パープレキシティが最も良いのは {name} で、"
        "{ppl} でした。ベースラインの {base_ppl} との差は {change} です。KV キャッシュの実測値は、"
        "{length} トークン・{dtype} で {base_kb} から {kb} へ {reduction} 削減されました。",
        "smallest": "キャッシュが最も小さいのは {name} で、実測 {kb}（{reduction} 削減）です。"
        "パープレキシティは {ppl}、ベースラインとの差は {change} でした。",
        "none_smaller": "学習を終えたコンテキストモデルのうち、ベースライン {baseline} よりキャッシュが小さいものは"
        "ありません。ベースラインのパープレキシティは {base_ppl}、KV キャッシュの実測値は {length} トークン・{dtype} "
        "で {base_kb} です。",
        "no_baseline": "パープレキシティが最も良いのは {name} の {ppl} で、KV キャッシュの実測値は {length} トークン・"
        "{dtype} で {kb} です。比較できるベースラインの結果はありません。",
        "made_elsewhere": "{baseline} から作られた {name} により、パープレキシティは {base_ppl} から {ppl} になりました"
        "（{change}）。KV キャッシュの実測値は {length} トークン・{dtype} で {kb} です。{baseline} のレポートは"
        "別にあります。",
        "nothing": "この実験には、まだ結果の出たモデルがありません。",
        "unfinished": "この実験は完了していません。全 {total} モデルのうち、完了 {done}、失敗 {failed}、未実行 "
        "{pending} です。",
        "failure": "{name} は失敗しました：{error}",
        "failed": "失敗",
        "pending": "未実行",
        "yes": "達成",
        "no": "未達",
        "settings": "実験設定",
        "setting": "項目",
        "value": "値",
        "data_source": "データ",
        "documents": "文書数（学習 / 検証）",
        "samples": "サンプル数（学習 / 検証）",
        "sequence_length": "系列長",
        "tokens": "{length} トークン（予測対象を含めて {with_target}）",
        "tokenizer": "トークナイザー",
        "vocabulary": "語彙数",
        "architecture": "アーキテクチャ",
        "body": "{layers} 層、隠れ次元 {hidden}、{heads} ヘッド、MLP 次元 {mlp}",
        "dropout": "ドロップアウト",
        "dropout_value": "{hidden}（隠れ層）、{attention}（アテンション重み）",
        "epochs": "最大エポック数",
        "batch": "バッチサイズ",
        "accumulated": "{batch} × 勾配累積 {accumulation} 回",
        "learning_rate": "学習率（AdamW）",
        "weight_decay": "重み減衰",
        "schedule": "学習率スケジュール",
        "warmup": "{schedule}、全ステップの {warmup} でウォームアップ",
        "precision": "数値精度",
        "patience": "早期終了の猶予",
        "patience_value": "{patience}（検証パープレキシティが改善しない評価がこの回数続いたら終了）",
        "seed": "乱数シード",
        "p1_iterations": "Phase 1：最大反復回数",
        "p1_wanted": "Phase 1：目標収束率",
        "p1_wanted_value": "{rate}（二乗平均の変化量が {threshold} 未満のトークンの割合）",
        "p1_learning_rate": "Phase 1：学習率（Adam）",
        "p1_batch": "Phase 1：バッチあたりのトークン数",
        "p1_noise": "Phase 1：ノイズ",
        "p1_state": "Phase 1：コンテキストのデータ型",
        "heal_steps": "追加学習：ステップ数",
        "heal_parameters": "追加学習：学習対象のパラメータ",
        "heal_ce_weight": "追加学習：テキストの交差エントロピーの重み",
        "heal_learning_rate": "追加学習：学習率（AdamW）",
        "heal_schedule": "追加学習：スケジュール",
        "heal_batch_size": "追加学習：バッチサイズ",
        "heal_precision": "追加学習：精度",
        "results": "結果",
        "model": "モデル",
        "context": "コンテキスト",
        "baseline": "ベースライン",
        "sharing": "{source} {dim}（{layers} 層で共有）",
        "converted": "{source} {dim}（変換）",
        "control": "対照：ベースラインの追加学習",
        "parameters": "パラメータ数（学習対象 / 全体）",
        "best_ppl": "最良 PPL",
        "best_epoch": "最良エポック",
        "accuracy": "正解率",
        "measured": "KV キャッシュ",
        "formula": "KV キャッシュ（計算式）",
        "reduction": "削減率",
        "change": "ベースラインとの差",
        "seconds_epoch": "秒/エポック",
        "overhead": "オーバーヘッド",
        "results_note": "PPL と正解率は、最良エポックにおける検証データ全トークンでの値です。KV キャッシュは、"
        "generate() が {length} トークン・{dtype}・バッチ 1 で実際に埋めたキャッシュの実測値です"
        "（1 KB = 1,024 バイト）。差と削減率はベースラインに対する値です。秒/エポックは全エポックの中央値、"
        "オーバーヘッドはそのベースラインに対する比で、Phase 1 の時間は含みません。",
        "timed_elsewhere": "{name} のオーバーヘッドは示しません。学習時間がベースラインとは別の環境"
        "（{device}、{processes} プロセス × {threads} スレッド）での値だからです。",
        "healed_note": "学習済みの {baseline} から続けたモデルは、同じデータを用い、{baseline} の予測も教師として "
        "{steps} ステップ追加学習したものです。最良エポックは、{baseline} の最良エポックにその後のエポック数を加えて"
        "示します。",
        "healed_by_text_note": "学習済みの {baseline} から続けたモデルは、同じデータで {steps} ステップ追加学習した"
        "ものです。最良エポックは、{baseline} の最良エポックにその後のエポック数を加えて示します。",
        "control_note": "{control} は、変換していない {baseline} を同様に追加学習したものです。キャッシュを小さくせずに"
        "追加学習だけで得られる分を示します。",
        "against_control": "対照 {control} に対する {name} の差：{change}。",
        "input_note": "コンテキスト源「input」のキャッシュはベースラインと同じ大きさです。コンテキストはトークン"
        "埋め込みを置き換えるだけで、後段のアテンション層は従来どおりキーとバリューをすべてキャッシュします。元のレポートの"
        "「1536.0 KB」は計算式による値でしたが、ここに示すのは実測値です。",
        "frontier_caption": "最良の検証パープレキシティと KV キャッシュの実測値。破線は、両方の指標で同時に上回る"
        "モデルがほかにないモデルを結んだ線、矢印は軸の範囲を超えるモデルです。",
        "cache": "キャッシュの内訳",
        "numbers": "トークンあたりの数値数",
        "bytes_measured": "実測値（バイト）",
        "bytes_formula": "計算値（バイト）",
        "slack": "拡張用の予約領域（バイト）",
        "cache_note": "拡張用の予約領域は、今後のトークンのためにキャッシュが確保しているメモリで、実測値とは分けて"
        "示しています。",
        "positions": "位置ごとの品質",
        "positions_note": "サンプル内の位置ごとに区切って求めたパープレキシティです。位置 p の次のトークンは p + 1 個の"
        "トークンから予測します。最終行はトークン数で、各行の対数パープレキシティをこの数で重み付けして平均すると、"
        "全トークンの値に一致します。",
        "positions_change": "括弧内は {baseline} との差です。",
        "positions_tokens": "トークン数",
        "positions_console": "サンプル内の位置ごとのパープレキシティ：",
        "positions_caption": "サンプル内の位置ごとのパープレキシティ（区間はすべて同じ幅で表示）。ベースラインが"
        "ある場合は、それとの差も示します。",
        "curves": "学習曲線",
        "curves_caption": "エポックごとの検証パープレキシティ、ベースラインとの差（ベースラインがある場合）、"
        "学習損失。",
        "curves_phase1_caption": "エポックごとの検証パープレキシティ、ベースラインとの差（ベースラインがある場合）、"
        "学習損失、および Phase 1 の反復ごとの収束率（点線は目標値）。",
        "phase1": "Phase 1（OACD）",
        "phase1_intro": "Phase 1 では、反復間でほとんど動かないトークンの割合が目標に達するまで ContextBlock だけを"
        "学習します。有効ランクは、学習に使っていないトークンのコンテキストから求めた値です。",
        "iterations": "反復回数",
        "reached": "到達した収束率",
        "wanted": "目標",
        "met": "判定",
        "rank": "有効ランク",
        "rank_value": "{rank} / {dim}",
        "seconds": "秒数",
        "convergence_by_iteration": "反復ごとの収束率（%、行頭は先頭の反復番号）：",
        "provenance": "実行環境",
        "device": "デバイス",
        "platform": "プラットフォーム",
        "threads": "CPU スレッド数",
        "versions": "バージョン",
        "commit": "コミット",
        "created": "作成日時",
        "fingerprint": "データのフィンガープリント",
        "command": "コマンド",
        "earlier": "このフォルダのモデルを学習したこれまでの実行(各モデルの環境は metrics.json、"
        "コミットとバージョンは provenance.json にあります):",
        "eval_title": "モデルの比較評価",
        "eval_best": "{first} よりキャッシュが小さいもののうち、パープレキシティの損失が最も小さいのは {name} でした。"
        "1 系列あたりの実測値は {first_kb} から {kb} へ {reduction} 削減され、パープレキシティは "
        "{ppl}（{first} は {first_ppl}、差は {change}）です。",
        "eval_none_smaller": "{first}（パープレキシティ {ppl}）よりキャッシュが小さいものはありません。",
        "eval_model": "モデル",
        "eval_ppl": "PPL",
        "eval_change": "差",
        "eval_accuracy": "正解率",
        "eval_cached_ppl": "PPL（逐次）",
        "eval_cached_change": "差（逐次）",
        "eval_cache": "KV キャッシュ",
        "eval_reduction": "削減率",
        "eval_kl": "KL",
        "eval_agreement": "top-1 一致率",
        "eval_difference": "ロジットの最大差",
        "eval_note": "PPL と正解率は、検証データ全 {tokens} トークンを並列に一度で評価した値です。PPL（逐次）は、"
        "そのうち先頭の {cached_tokens} トークンを、キャッシュを通して 1 トークンずつ評価した値です。KV キャッシュは、"
        "この逐次評価で実際に埋まったキャッシュの実測値で、{length} トークン・{dtype} の 1 系列あたりのバイト数です"
        "（1 KB = 1,024 バイト）。差、削減率、KL（KL({first} || モデル)、1 トークンあたりのナット）、top-1 一致率は "
        "{first} に対する値で、量子化キャッシュの KL と top-1 一致率は逐次評価によるものです。",
        "eval_agree": "同じ {cached_tokens} トークンに対する並列評価と逐次評価のパープレキシティは、すべてのモデルで "
        "4 桁まで一致しました。",
        "eval_disagree": "同じ {cached_tokens} トークンに対する並列評価と逐次評価のパープレキシティが、"
        "4 桁以内で一致しないモデルがあります：{found}。",
        "eval_quantised": "量子化キャッシュには transformers の HQQ バックエンドを用い、1 トークン内の最大 64 個の"
        "数値を 1 グループとしました。residual length は {residual} で、"
        "この数のトークンがたまるまで量子化せずに保持します。バイト数は、パックされた整数、スケール、ゼロ点、未量子化のトークンをすべて含む実測値です。",
        "eval_caption": "全トークンのパープレキシティ（量子化キャッシュは、{cached_tokens} トークンの逐次評価での差を"
        "同じモデルの量子化なしの値に掛けたもの）と、{length} トークンの 1 系列あたりのキャッシュの実測値。"
        "破線は、両方の指標で同時に上回るものがほかにない点を結んだ線、矢印は軸の範囲を超えるモデルです。",
        "eval_tasks": "lm-evaluation-harness のタスク",
    },
}
