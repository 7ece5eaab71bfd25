#!/bin/sh
# Measure what policies cost, and write docs/results.md: benchmarks/quality.sh [SECTION ...]; all but paper by default.
#
#   leaderboard  texts read under every policy at three budgets, and recall (an hour on two cores for each small model)
#   answers      problems answered under some policies (hours on two cores, minutes on a GPU)
#   ablation     the parts of VaSE, one by one, on texts and recall
#   values       where value states are large
#   paper        VaSE's pilot study as published: GSM8K, 512 slots, four runs (hours on a GPU; MODEL is Qwen/Qwen3-4B)
#   page         the tables of docs/results.md, from what is there
#
#   PYTHON  which has kvpolicy[eval]; MODELS  folders or names on the hub, the default model where none;
#   KVPOLICY_DATA  holds gsm8k/, svamp/, wikitext2/; RESULTS  a folder, .results by default: what is there is gone on with
#
# Killed, it goes on where it was.
set -eu
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
results=${RESULTS:-$root/.results}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$results"

# NAME, then arguments: each name is a file, so that several can run at once. What is compared and the parts of VaSE
# share a file, since some policies are both.
evaluate() {
    name=$1
    shift
    for model in ${MODELS:-}; do
        set -- --model "$model" "$@"
    done
    "$python" -m kvpolicy.cli eval --out "$results/$name.jsonl" "$@"
}

for section in ${*:-leaderboard answers ablation values page}; do
    echo "== $section"
    case $section in
        leaderboard)
            evaluate leaderboard --leaderboard --task "wikitext(length=512)" --budget 64 --budget 96 --budget 128
            evaluate recall --leaderboard --task "passcode(length=512, count=48)" --budget 128
            ;;
        answers)
            evaluate answers --leaderboard --task "svamp(shots=1, split='odd')" --limit 200 --budget 96 --batch 40
            ;;
        ablation)
            evaluate leaderboard --ablation --task "wikitext(length=512)" --budget 128
            evaluate recall --ablation --task "passcode(length=512, count=48)" --budget 128
            ;;
        values)
            # shellcheck disable=SC2086  # several models
            "$python" -m benchmarks.quality.values --text wikitext --tokens 1024 ${MODELS:-} > "$results/values.md"
            ;;
        paper)
            MODELS=${MODELS:-Qwen/Qwen3-4B} evaluate paper --ablation --task gsm8k --limit 500 --budget 512 \
                --max-new-tokens 4096 --temperature 0.6 --top-p 0.95 --seed 0 --seed 1 --seed 2 --seed 3 --batch 64
            ;;
        page)
            "$python" -m benchmarks.quality.page "$root/docs/results.md" "$results"/*.jsonl
            ;;
        *)
            echo "there is no section $section: they are leaderboard, answers, ablation, values, paper, page" >&2
            exit 2
            ;;
    esac
done
