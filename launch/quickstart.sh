#!/usr/bin/env bash
# From nothing to a distilled student and a report, on a laptop's CPU or on GPUs, in one command.
#
#   launch/quickstart.sh                            the whole comparison (under 15 minutes on 2 cores)
#   launch/quickstart.sh --short                    the same path with few steps (a smoke test; figures mean nothing)
#   launch/quickstart.sh corpus.paths='[my/text]'   on your own text (.py, .txt, .md, .jsonl)
#   RUN=runs/mine launch/quickstart.sh ...          in another folder (default runs/quickstart)
#
# Running it again goes on where it stopped and skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh hf eval

RUN=${RUN:-runs/quickstart}
# Two processes, or as many as there are GPUs if that is fewer.
NPROC=${NPROC:-$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')}
RECIPES=launch/recipes/quickstart
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

short="" own_text="" corpus=() teacher=() student=() evaluation=() most_sequences=6144
for argument in "$@"; do
    case "$argument" in
        --short) short=1 ;;
        corpus.paths=*) own_text=1 corpus+=("$argument") ;;
        corpus.*=* | tokenizer.*=*) corpus+=("$argument") ;;
        *) echo "quickstart.sh: error: unknown argument $argument; expected --short, corpus.KEY=VALUE or" \
            "tokenizer.KEY=VALUE" >&2; exit 2 ;;
    esac
done
if [ -z "$own_text" ]; then
    corpus=("corpus.paths=['$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')']" "${corpus[@]}")
    [ -z "$short" ] || corpus=("corpus.include=['a*.py', 'c*.py']" "${corpus[@]}")
fi
if [ -n "$short" ]; then
    RUN=$RUN-short
    most_sequences=128
    corpus=("tokenizer.training_bytes=500000" "tokenizer.vocab_size=1024" "${corpus[@]}")
    teacher=(train.steps=60 optimizer.warmup_steps=5 model.num_layers=2 model.hidden_size=64 model.ffn_hidden_size=160)
    student=(train.steps=20 model.hidden_size=64 model.ffn_hidden_size=160)
    evaluation=(eval.num_sequences=32)
fi
tokens=("data.tokens=$RUN/tokens/train" "data.held_out_tokens=$RUN/tokens/held_out")

log() { printf '\n== [%dm%02ds] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
alone() { python -m distill_pretrain "$@"; }
together() { torchrun --standalone --nproc-per-node="$NPROC" -m distill_pretrain "$@"; }

log "tokenize"
alone tokenize $RECIPES/tokenize.yaml "corpus.output_dir=$RUN/tokens" "${corpus[@]}"
# At most most_sequences of the 128 tokens that data.yaml asks for; fewer where the text is short.
num_sequences=$(python -c 'import json, sys
print(min(int(sys.argv[2]), -(-json.load(open(sys.argv[1]))["corpora"]["train"]["num_tokens"] // 128)))' \
    "$RUN/tokens/tokens.json" "$most_sequences")
data=("${tokens[@]}" "data.num_sequences=$num_sequences")

log "train the teacher ($NPROC processes, data parallel)"
together train $RECIPES/teacher.yaml "${tokens[@]}" "${teacher[@]}" "train.output_dir=$RUN/teacher"
log "capture the teacher's distribution ($NPROC processes)"
together capture $RECIPES/capture.yaml "${data[@]}" "teacher.path=$RUN/teacher" "capture.output_dir=$RUN/cache"
log "verify the cache"
alone verify $RECIPES/student_kd.yaml "${data[@]}" "data.cache=$RUN/cache"
log "train the baseline student on the text ($NPROC processes, tensor parallel)"
together train $RECIPES/student_ce.yaml "${data[@]}" "${student[@]}" "parallel.tensor=$NPROC" \
    "train.output_dir=$RUN/student_ce"
log "train the same student from the cache ($NPROC processes, tensor parallel)"
together train $RECIPES/student_kd.yaml "${data[@]}" "${student[@]}" "parallel.tensor=$NPROC" \
    "train.output_dir=$RUN/student_kd" "data.cache=$RUN/cache"
models="{teacher: $RUN/teacher, 'student, CE': $RUN/student_ce, 'student, KD': $RUN/student_kd}"
log "evaluate on held-out text ($NPROC processes)"
together eval $RECIPES/report.yaml "${data[@]}" "${evaluation[@]}" "teacher.path=$RUN/teacher" \
    "eval.models=$models" "eval.output=$RUN/eval.json"
log "report"
alone report $RECIPES/report.yaml "report.runs=$models" "report.eval=$RUN/eval.json" "report.output_dir=$RUN/report"
log "done"
