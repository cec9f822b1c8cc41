#!/usr/bin/env bash
# Builds llama.cpp's programs (llama-cli, llama-server, llama-perplexity) from the sources in PyPI's llama-cpp-python.
#
#   bash tests/build_llama_cpp.sh [FOLDER]     default: ~/.cache/qatmoe/llama.cpp; prints the folder of the programs
#
# Needs cmake and a C++ compiler. 5 minutes on 2 cores; a folder that is built already is left as it is. CMAKE_ARGS holds
# further options with spaces between (docs/deploy.md says when they are needed); what was built with others is built again.
set -euo pipefail
version=0.3.36
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/qatmoe/llama.cpp}
mkdir -p "$folder"
cd "$folder"
source=llama_cpp_python-$version
programs=(llama-cli llama-server llama-perplexity)
options=$source/build/qatmoe_options
there() {
    [ "$(cat "$options" 2>/dev/null)" = "${CMAKE_ARGS:-}" ] || return 1
    for program in "${programs[@]}"; do [ -x "$source/build/bin/$program" ] || return 1; done
}
if ! there; then
    {
        [ -f "$source.tar.gz" ] || "${PYTHON:-python3}" -m pip download --no-deps --no-binary :all: "llama-cpp-python==$version"
        tar xzf "$source.tar.gz"
        [ "$(cat "$options" 2>/dev/null)" = "${CMAKE_ARGS:-}" ] || rm -rf "$source/build"
        mkdir -p "$source/build"
        echo "${CMAKE_ARGS:-}" > "$options"
        cmake -S "$source/vendor/llama.cpp" -B "$source/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
            -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF ${CMAKE_ARGS:-}
        cmake --build "$source/build" --target "${programs[@]}" -j "$(nproc)"
    } >&2
fi
echo "$folder/$source/build/bin"
