#!/usr/bin/env bash
# The comparison of target kinds on a laptop's CPU or on GPUs: cross-entropy, FullKD, Top-K with every treatment of the
# missing mass, and both unbiased samplers, three seeds each, with tables, errors and pictures.
#
#   launch/compare.sh                            everything (about an hour on 2 cores)
#   launch/compare.sh --short                    the same path with two cells and few steps (a smoke test)
#   launch/compare.sh corpus.paths='[my/text]'   on your own text (.py, .txt, .md, .jsonl)
#   RUN=runs/mine launch/compare.sh ...          in another folder (default runs/compare)
#
# Running it again goes on where it stopped and skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh hf eval
RUN=${RUN:-runs/compare}
source launch/jobs.sh
parse_arguments "$@"

most_sequences=4800 smaller=()
if [ -n "$short" ]; then
    most_sequences=128
    smaller=(
        train.steps=8 model.hidden_size=64 model.ffn_hidden_size=160
        "compare.teacher.model={num_layers: 2, hidden_size: 64, ffn_hidden_size: 160}"
        "compare.teacher.optimizer={warmup_steps: 5}" compare.teacher.train.steps=60
        "capture.sets={systematic-50: {sampler: systematic, num_draws: 50}}"
        "compare.cells={ce: {objective: {ce_weight: 1.0}}, systematic-50: {set: systematic-50, objective: {ce_weight: 0.0, kd_weight: 1.0}}}"
        "compare.seeds=[1]" "compare.eval={num_sequences: 32}"
    )
fi

log "tokenize"
tokenize_corpus "$most_sequences"
log "teacher, capture, students, evaluation, report ($NPROC processes)"
together compare launch/recipes/compare/cpu.yaml "${data[@]}" "${smaller[@]}" \
    "teacher.path=$RUN/teacher" "capture.output_dir=$RUN/cache" "compare.output_dir=$RUN" "train.output_dir=$RUN/cells"
log "done: $RUN/report/report.md"
