"""What the report of a sweep says, in each language: one table of the same keys and placeholders for all."""

SWEEP_TRANSLATIONS: dict[str, dict[str, str]] = {
    "en": {
        "title": "Context-Pythia sweep, recipe “{recipe}”",
        "best": "The best mean perplexity is {ppl} (n = {n}), of {name}, with a measured KV cache of {kb}.",
        "best_smaller": "Of the settings with a smaller cache than the baseline, {name} has the best: {ppl} (n = "
        "{n}), {change} against the baseline's best setting, with {kb}, a reduction of {reduction}.",
        "nothing": "No trial of this sweep has a result yet.",
        "counts": "{total} trials of {settings} settings: {complete} with a result, {failed} failed, {running} "
        "running, {waiting} waiting.",
        "pareto": "Mean of the best validation perplexities over seeds (whiskers: smallest and largest) against the "
        "measured KV cache; the dashed line joins the settings that no other beats in both.",
        "perplexities": "The mean of each setting's best validation perplexities, and each seed's (small).",
        "best_of_each": "Best setting of each model",
        "budget": "Trials of each model: {budgets}. Perplexities of models compare where each was searched as much.",
        "healed": "Trained longer than the others, since they go on from the trained baseline: {names}.",
        "against_control": "{name} against the control {control}, means over the same seeds: {change}.",
        "all_settings": "All settings",
        "table_note": "Mean, smallest, largest and sample standard deviation of the best validation perplexity over "
        "seeds. n: seeds with a result, of all. Change and reduction: against the baseline's setting of the best mean, "
        "of the same data. KV cache: measured on a cache that generate() filled, batch 1; 1 KB = 1,024 bytes. "
        "Unbeaten: no other setting of the same data is at least as good in both perplexity and cache, and better in "
        "one. A dash: does not concern the model.",
        "failure": "{name} failed: {error}",
        "failed": "failed",
        "yes": "yes",
        "model": "Model",
        "n": "n",
        "mean": "Mean PPL",
        "range": "Smallest–largest",
        "std": "Std",
        "change": "Against baseline",
        "cache": "KV cache",
        "reduction": "Reduction",
        "unbeaten": "Unbeaten",
        "positions_note": "The best setting of each model: perplexity at these positions of a sample, the mean over "
        "seeds. At position p the next token is predicted from p + 1 tokens; the last line counts the tokens.",
        "importance": "Importance for perplexity",
        "share": "Share",
        "importance_note": "By {evaluator} (arXiv 2304.10255) over {trials} trials: how much a setting's values among "
        "the best {quantile} of the trials differ from those of all, in shares of the sum. With few trials the shares "
        "are rough.",
        "no_importance": "Not computed: {reason}.",
        "settings": "Settings",
        "setting": "Setting",
        "value": "Value",
        "searched": "Searched",
        "sampler": "Sampler",
        "seeds": "Seeds",
        "study": "Study",
        "device": "Device",
        "versions": "Versions",
        "commit": "Commit",
        "created": "Started",
        "command": "Command",
        "earlier_calls": "Earlier calls that trained trials of this sweep (provenance.json has their commits and "
        "versions):",
        "rest": "What is not searched",
        "where": "Each trial has a run folder in trials/; `context-pythia report` of that folder writes its report.",
    },
    "ja": {
        "title": "Context-Pythia スイープ（レシピ「{recipe}」）",
        "best": "平均パープレキシティが最も良いのは {name} の {ppl}（n = {n}）で、KV キャッシュの実測値は {kb} です。",
        "best_smaller": "ベースラインよりキャッシュが小さい設定の中では {name} が最も良く、{ppl}（n = {n}）でした。"
        "ベースラインの最良の設定との差は {change}、KV キャッシュの実測値は {kb}（{reduction} 削減）です。",
        "nothing": "このスイープには、まだ結果の出た試行がありません。",
        "counts": "設定 {settings} 通り、試行 {total} 件のうち、完了 {complete}、失敗 {failed}、実行中 {running}、"
        "待機中 {waiting} です。",
        "pareto": "シードにわたる最良の検証パープレキシティの平均（ひげは最小と最大）と KV キャッシュの実測値。"
        "破線は、両方の指標で同時に上回る設定がほかにないものを結んだ線です。",
        "perplexities": "各設定における最良の検証パープレキシティの平均と、シードごとの値（小さい点）。",
        "best_of_each": "モデルごとの最良の設定",
        "budget": "モデルごとの試行数：{budgets}。パープレキシティは、"
        "同じ回数だけ探索したモデルどうしでのみ比較できます。",
        "healed": "学習済みのベースラインから続けたため、ほかのモデルより長く学習しています：{names}。",
        "against_control": "対照 {control} に対する {name} の差（同じシードの平均）：{change}。",
        "all_settings": "すべての設定",
        "table_note": "シードにわたる最良の検証パープレキシティの平均、最小、最大、標本標準偏差です。n は、結果の出た"
        "シードの数と総数です。差と削減率は、同じデータで平均が最も良いベースラインの設定に対する値です。"
        "KV キャッシュは、generate() がバッチ 1 で実際に埋めたキャッシュの実測値です（1 KB = 1,024 バイト）。"
        "非劣解とは、同じデータで、パープレキシティとキャッシュの両方で同等以上、かつ一方で優る設定がほかにないものです。"
        "ダッシュは、そのモデルに関係しないことを示します。",
        "failure": "{name} は失敗しました：{error}",
        "failed": "失敗",
        "yes": "はい",
        "model": "モデル",
        "n": "n",
        "mean": "平均 PPL",
        "range": "最小–最大",
        "std": "標準偏差",
        "change": "ベースラインとの差",
        "cache": "KV キャッシュ",
        "reduction": "削減率",
        "unbeaten": "非劣解",
        "positions_note": "モデルごとの最良の設定について、サンプル内の位置ごとのパープレキシティ（シードの平均）を"
        "示します。位置 p の次のトークンは p + 1 個のトークンから予測します。最終行はトークン数です。",
        "importance": "パープレキシティへの重要度",
        "share": "割合",
        "importance_note": "{evaluator}（arXiv 2304.10255）による値です。試行 {trials} 件のうち上位 {quantile} での"
        "設定値の分布が全体の分布とどれだけ異なるかを、合計に対する割合で示します。試行が少ないと、割合は大まかな値になります。",
        "no_importance": "計算していません（{reason}）。",
        "settings": "設定",
        "setting": "設定",
        "value": "値",
        "searched": "探索した項目",
        "sampler": "サンプラー",
        "seeds": "シード",
        "study": "スタディ",
        "device": "デバイス",
        "versions": "バージョン",
        "commit": "コミット",
        "created": "開始日時",
        "command": "コマンド",
        "earlier_calls": "このスイープの試行を学習したこれまでの実行（コミットとバージョンは provenance.json に"
        "あります）：",
        "rest": "探索していない項目",
        "where": "各試行の実行フォルダは trials/ にあり、`context-pythia report` がそのレポートを作ります。",
    },
}
