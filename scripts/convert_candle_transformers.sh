#!/usr/bin/env bash
# Converts the models of candle-transformers to the layers of this crate, and type-checks them: what docs/migration.md promises of a rename, tried on a
# hundred models. Half of the files name each layer anew (`candle_nn::LayerNorm` becomes `candle_norm::LayerNorm`), the other half rename candle-nn as a
# whole (`candle_nn` becomes `candle_norm::nn`); the types are the same, so that the halves fit together. Not one line may fail.
#
#     scripts/convert_candle_transformers.sh          # in $CARGO_TARGET_DIR or target
#
# Needs cargo, awk and, the first time, crates.io: where that cannot be reached, it says so and checks nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.11.1
# Fewer names than this mean that the script no longer finds them.
least_names=300
repository=$PWD
CARGO_TARGET_DIR=$(realpath -m "${CARGO_TARGET_DIR:-target}")
export CARGO_TARGET_DIR
work=$CARGO_TARGET_DIR/converted

# The dependencies of candle-transformers without what only GPUs need; candle-transformers itself is there for its sources, and never built. Lock file and
# profile are those of this crate, so that what both depend on is checked once.
rm -rf "$work"
mkdir -p "$work/src"
touch "$work/src/lib.rs"
cp Cargo.lock "$work/Cargo.lock"
cat > "$work/Cargo.toml" << END
[package]
name = "converted-candle-transformers"
version = "0.0.0"
edition = "2021"
publish = false

[lib]
name = "candle_transformers"

[dependencies]
candle = { package = "candle-core", version = "=$version" }
candle-nn = "=$version"
candle-norm = { path = "$repository" }
byteorder = "1"
fancy-regex = "0.19"
num-traits = "0.2"
rand = "0.9"
rayon = "1"
serde = { version = "1", features = ["derive"] }
serde_json = "1"
serde_plain = "1"
tracing = "0.1"

[dev-dependencies]
originals = { package = "candle-transformers", version = "=$version" }

[lints.rust]
warnings = "allow"

$(sed -n '/^\[profile\.dev/,/^$/p' Cargo.toml)

[workspace]
END

host=$(rustc -vV | sed -n 's/^host: //p')
metadata() {
    cargo metadata --quiet --format-version 1 --filter-platform "$host" --manifest-path "$work/Cargo.toml" "$@"
}
if ! packages=$(metadata 2> "$work/registry") && ! packages=$(metadata --offline 2>> "$work/registry"); then
    cat "$work/registry"
    if (cd / && cargo info --quiet --registry crates-io "candle-transformers@$version" > "$work/info" 2>&1); then
        printf 'crates.io can be reached: the fault is in the manifest above\n'
        exit 1
    fi
    printf '\n!!! SKIPPED: crates.io cannot be reached, and candle-transformers %s is not here. Nothing was converted or checked.\n' "$version"
    exit 0
fi
manifest=$(grep -o "\"manifest_path\":\"[^\"]*/candle-transformers-$version/Cargo.toml\"" <<< "$packages" | cut -d '"' -f 4 | sort -u)
sources=${manifest%/Cargo.toml}/src
if ! [ -d "$sources" ]; then
    printf 'expected the sources of candle-transformers %s, got %s from cargo metadata\n' "$version" "${manifest:-nothing}"
    exit 1
fi

# Reads one file of candle-transformers and writes it with other names; how many were renamed goes to the file `count`.
cat > "$work/convert.awk" << 'END'
BEGIN {
    RS = "\001"
    split("BatchNorm BatchNormConfig batch_norm LayerNorm LayerNormConfig layer_norm layer_norm_no_bias RmsNorm rms_norm GroupNorm " \
        "group_norm Conv1d conv1d conv1d_no_bias ConvTranspose1d conv_transpose1d conv_transpose1d_no_bias", list, " ")
    for (i in list) ours[list[i]] = 1
}

# The path under which this crate has `name` of candle-nn, or nothing.
function path_of(name) {
    if (name in ours) return "candle_norm::" name
    if (name == "ops" || name == "rotary_emb") return "candle_norm::nn::" name
    return ""
}

# Where the brace that opens at `start` of `text` closes.
function closing(text, start,    i, c, depth) {
    depth = 0
    for (i = start; i <= length(text); i++) {
        c = substr(text, i, 1)
        if (c == "{") depth++
        if (c == "}" && --depth == 0) return i
    }
    return 0
}

# An import of several names, taken apart at the commas outside of inner braces: what stays with candle-nn, and what does not.
function group(inside, public,    i, c, depth, item, kept, moved, name, path, rest) {
    inside = inside ","
    for (i = 1; i <= length(inside); i++) {
        c = substr(inside, i, 1)
        if (c == "{") depth++
        if (c == "}") depth--
        if (c != "," || depth > 0) {
            item = item c
            continue
        }
        gsub(/^[ \t\n]+|[ \t\n]+$/, "", item)
        match(item, /^[A-Za-z0-9_]*/)
        name = substr(item, 1, RLENGTH)
        rest = substr(item, RLENGTH + 1)
        path = path_of(name)
        if (path != "") {
            moved = moved " " public "use " path rest ";"
            renamed++
        } else if (item != "") {
            kept = kept item ", "
        }
        item = ""
    }
    return public "use candle_nn::{" kept "};" moved
}

{
    text = $0
    if (whole) {
        renamed = gsub(/candle_nn/, "candle_norm::nn", text)
    } else {
        # Imports in braces.
        out = ""
        while (match(text, /(pub )?use candle_nn::\{/)) {
            head = substr(text, RSTART, RLENGTH)
            brace = RSTART + RLENGTH - 1
            end = closing(text, brace)
            public = head ~ /^pub / ? "pub " : ""
            out = out substr(text, 1, RSTART - 1) group(substr(text, brace + 1, end - brace - 1), public)
            text = substr(text, end + 2)
        }
        text = out text
        # Paths, in imports of one name and in code.
        out = ""
        while (match(text, /candle_nn::[A-Za-z0-9_]+/)) {
            found = substr(text, RSTART, RLENGTH)
            path = path_of(substr(found, 12))
            if (path != "") renamed++
            out = out substr(text, 1, RSTART - 1) (path != "" ? path : found)
            text = substr(text, RSTART + RLENGTH)
        }
        text = out text
        renamed += gsub(/use candle_nn as /, "use candle_norm::nn as ", text)
    }
    # The one method that takes candle's own norm; docs/migration.md names it.
    renamed += gsub(/conv\.absorb_bn\(&bn\)/, "bn.fold_into(\\&conv)", text)
    printf "%s", text
    print renamed + 0 >> count
}
END

files=0
: > "$work/count"
while IFS= read -r file; do
    mkdir -p "$work/src/$(dirname "$file")"
    awk -v whole=$((files % 2)) -v count="$work/count" -f "$work/convert.awk" "$sources/$file" > "$work/src/$file"
    files=$((files + 1))
done < <(cd "$sources" && find . -name '*.rs' | sort)
names=$(awk '{ sum += $1 } END { print sum + 0 }' "$work/count")
printf '%d names in %d of %d files renamed\n' "$names" "$(grep -c -v '^0$' "$work/count")" "$files"
if [ "$names" -lt "$least_names" ]; then
    printf 'expected at least %d: candle-transformers or this script has changed\n' "$least_names"
    exit 1
fi

cargo check --quiet --offline --lib --manifest-path "$work/Cargo.toml"
printf 'candle-transformers %s type-checks with the layers of this crate\n' "$version"
