# Sourced: `source launch/env.sh [extra ...]` makes and activates a virtual environment with the package in it.
#
#   VENV        where it is (default .venv in the repository)
#   PYTHON      of which interpreter: a path, a name, or a version such as 3.12 (default python3)
#   TORCH_SPEC  what to install as torch, such as torch==2.13.0 (default: see below)
#   PINS        more to install with the package, such as "megatron-core==0.16.1 transformers==5.5.0"
#
# torch goes first, so that nothing replaces it: TORCH_SPEC if set; the interpreter's own torch where that is built for
# GPUs (container images bring one); else a plain torch, pinned on machines without an NVIDIA driver.

_env_fail() {
    echo "launch/env.sh: error: $1" >&2
    if [ -n "${2:-}" ] && [ -s "${2:-}" ]; then
        echo "--- end of $2" >&2
        tail -n 20 "$2" >&2
    fi
    return 1
}

_env_setup() {
    local root extras venv python log stamp key torch_spec site_packages=""
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    extras=$(IFS=,; echo "${*:-hf,eval}")
    venv=${VENV:-$root/.venv}
    log=$venv/install.log
    stamp=$venv/installed
    python=$(_env_python "${PYTHON:-python3}") ||
        { _env_fail "${PYTHON:-python3} is not on PATH, nor a version of pyenv; install Python 3.10 or newer"; return 1; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { _env_fail "$python is $("$python" -V 2>&1); 3.10 or newer is needed"; return 1; }

    key=$( (cat "$root/setup.py" "$root/pyproject.toml" "$root"/distill_pretrain/cache/codec/hc/*.c; echo "$root ${TORCH_SPEC:-}${PINS:+ $PINS}") | "$python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') || return 1
    if [ -n "${PYTHON:-}" ] && [ -x "$venv/bin/python" ] &&
        [ "$("$venv/bin/python" -V 2>&1)" != "$("$python" -V 2>&1)" ]; then
        _env_fail "$venv is of another Python ($("$venv/bin/python" -V 2>&1)) than $python; remove it, or set VENV"
        return 1
    fi
    if ! _env_is_ready "$stamp" "$key" "$extras"; then
        if "$python" -c 'import torch, sys; sys.exit(not (torch.version.cuda or torch.version.hip))' 2>/dev/null &&
            [ -z "${TORCH_SPEC:-}" ]; then
            site_packages=--system-site-packages
            torch_spec=
        elif [ -n "${TORCH_SPEC:-}" ]; then
            torch_spec=$TORCH_SPEC
        elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
            torch_spec="torch>=2.6"
        else
            torch_spec="torch==2.13.0"
        fi
        echo "setting up $venv (a few minutes the first time; log: $log)"
        if [ ! -x "$venv/bin/python" ]; then
            # shellcheck disable=SC2086 # empty or one option
            "$python" -m venv $site_packages "$venv" ||
                { _env_fail "no virtual environment at $venv; is the venv module (python3-venv) installed?"; return 1; }
        fi
        : >"$log" || { _env_fail "cannot write $log"; return 1; }
        extras=$(_env_union "$stamp" "$extras")
        rm -f "$stamp"
        if [ -n "$torch_spec" ]; then
            _env_pip "$venv" "$log" "$torch_spec" ||
                { _env_fail "$torch_spec could not be installed; set TORCH_SPEC to one that can" "$log"; return 1; }
        fi
        # shellcheck disable=SC2086 # several requirements
        (cd "$root" && _env_pip "$venv" "$log" -e ".[$extras]" ${PINS:-}) ||
            { _env_fail "the package could not be installed" "$log"; return 1; }
        printf '%s\n%s\n' "$key" "$extras" >"$stamp"
    fi
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
    # Nothing was compiled as it was installed, so Python has to keep what it compiles.
    export PYTHONDONTWRITEBYTECODE=
}

# The interpreter by that path, name or version that runs; a shim of pyenv is there for versions that it does not run.
_env_python() {
    local candidate found
    for candidate in "$1" "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1"{,.*}/bin/python3; do
        if found=$(command -v "$candidate") && "$found" -c '' >/dev/null 2>&1; then
            echo "$found"
            return
        fi
    done
    return 1
}

# uv installs in a fraction of pip's time, with pip's own settings of where packages are. It does not see the packages
# of an interpreter around the environment, such as a container's torch: there, and where uv fails, pip installs.
_env_pip() {
    local venv=$1 log=$2
    shift 2
    { grep -qx 'include-system-site-packages = false' "$venv/pyvenv.cfg" && _env_uv "$venv" "$@"; } >>"$log" 2>&1 ||
        "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile "$@" >>"$log" 2>&1
}

_env_uv() (
    venv=$1
    shift
    pip=("$venv/bin/python" -m pip --disable-pip-version-check)
    setting() { "${pip[@]}" config get "global.$1" 2>/dev/null || "${pip[@]}" config get ":env:.$1" 2>/dev/null || true; }
    [ -x "$venv/bin/uv" ] || "${pip[@]}" install uv || return 1
    index=$(setting index-url)
    certificate=$(setting cert)
    [ -z "$index" ] || export UV_DEFAULT_INDEX=$index
    [ -z "$certificate" ] || export SSL_CERT_FILE=$certificate
    UV_INDEX=$(setting extra-index-url | tr '\n' ' ') UV_FIND_LINKS=$(setting find-links | tr -s ' \n' ',' | sed 's/,$//') \
        UV_INDEX_STRATEGY=unsafe-best-match UV_LINK_MODE=hardlink \
        "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"
)

# The extras asked for and those installed before.
_env_union() {
    local earlier=""
    [ -f "$1" ] && earlier=$(sed -n 2p "$1")
    echo "$earlier,$2" | tr ',' '\n' | sort -u | grep . | paste -sd, -
}

# Ready when the stamp has the same key and at least the extras asked for.
_env_is_ready() {
    local key extras extra
    [ -f "$1" ] || return 1
    { read -r key && read -r extras; } <"$1" || return 1
    [ "$key" = "$2" ] || return 1
    for extra in ${3//,/ }; do
        case ",$extras," in *",$extra,"*) ;; *) return 1 ;; esac
    done
}

_env_setup "$@"
