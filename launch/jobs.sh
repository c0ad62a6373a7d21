# Sourced after env.sh by the scripts that go from text to a report: their arguments, how they start a job, the corpus.
#
#   RUN    folder of everything they write
#   NPROC  processes of a job (default 2, or as many as there are GPUs if that is fewer)

NPROC=${NPROC:-$(python -c 'import torch; print(min(2, torch.cuda.device_count() or 2))')}
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

log() { printf '\n== [%dm%02ds] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
alone() { python -m distill_pretrain "$@"; }
together() { torchrun --standalone --nproc-per-node="$NPROC" -m distill_pretrain "$@"; }

# Sets short (empty or 1) and corpus (overrides of the sections corpus and tokenizer); RUN gets a suffix if short.
parse_arguments() {
    local argument own_text=""
    short="" corpus=()
    for argument in "$@"; do
        case "$argument" in
            --short) short=1 ;;
            corpus.paths=*) own_text=1 corpus+=("$argument") ;;
            corpus.*=* | tokenizer.*=*) corpus+=("$argument") ;;
            *) echo "${0##*/}: error: unknown argument $argument; expected --short, corpus.KEY=VALUE or" \
                "tokenizer.KEY=VALUE" >&2; exit 2 ;;
        esac
    done
    if [ -z "$own_text" ]; then
        corpus=("corpus.paths=['$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')']" "${corpus[@]}")
        [ -z "$short" ] || corpus=("corpus.include=['a*.py', 'c*.py']" "${corpus[@]}")
    fi
    if [ -n "$short" ]; then
        RUN=$RUN-short
        corpus=("tokenizer.training_bytes=500000" "tokenizer.vocab_size=1024" "${corpus[@]}")
    fi
}

# Tokenizes into $RUN/tokens; sets tokens and data, the overrides of the section data for the teacher and the students,
# with at most $1 sequences of 128 tokens, fewer where the text is short.
tokenize_corpus() {
    alone tokenize launch/recipes/quickstart/tokenize.yaml "corpus.output_dir=$RUN/tokens" "${corpus[@]}"
    tokens=("data.tokens=$RUN/tokens/train" "data.held_out_tokens=$RUN/tokens/held_out")
    data=("${tokens[@]}" "data.num_sequences=$(python -c 'import json, sys
print(min(int(sys.argv[2]), -(-json.load(open(sys.argv[1]))["corpora"]["train"]["num_tokens"] // 128)))' \
        "$RUN/tokens/tokens.json" "$1")")
}
