#!/usr/bin/env bash
# Writes an OCI image with every program that runs in a cluster, without a container engine: static
# programs in an otherwise empty file system. The same sources and tools give the same bytes.
#
#   scripts/image.sh [DIRECTORY]    writes DIRECTORY/palisade-VERSION.tar (an OCI archive)
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-dist}
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
name=localhost/palisade:$version
case $(uname -m) in
    x86_64) target=x86_64-unknown-linux-gnu arch=amd64 ;;
    aarch64) target=aarch64-unknown-linux-gnu arch=arm64 ;;
    *)
        echo "image: error: there is no image for $(uname -m); build on x86_64 or aarch64" >&2
        exit 1
        ;;
esac

# What is in the image; the lab stays on the machine that it is built on.
packages=(cli agent cni operator)
[ ! -d crates/proxy ] || packages+=(proxy)
programs=(palisade palisade-agent palisade-cni palisade-operator)
[ ! -d crates/proxy ] || programs+=(palisade-proxy)

# Paths of this machine, and the symbols that the linker's optimiser names after them, would make the
# bytes differ from machine to machine. Cargo names the eBPF programs after the path of what they
# depend on, so the sources are seen at the same one everywhere.
readonly PLACE=/mnt

build() {
    local flags=()
    for package in "${packages[@]}"; do flags+=(--package "palisade-$package"); done
    RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols --remap-path-prefix=$PLACE=/palisade \
--remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
        unshare --mount bash -c 'mount --rbind . "$0" && cd "$0" && exec "$@"' "$PLACE" \
        "${CARGO:-cargo}" build --release --locked --target "$target" "${flags[@]}" --bins
}

# pack DIRECTORY FILE: a tar whose bytes depend on names, modes and contents alone.
pack() {
    tar --create --file "$2" --directory "$1" --format=gnu --sort=name --mtime=@0 \
        --owner=0 --group=0 --numeric-owner --mode=u+rwX,go+rX,go-w .
}

digest() { sha256sum "$1" | cut -d ' ' -f 1; }

# blob FILE: moves it among the blobs and prints its digest.
blob() {
    local sum
    sum=$(digest "$1")
    mv "$1" "$work/image/blobs/sha256/$sum"
    echo "$sum"
}

size() { stat -c %s "$work/image/blobs/sha256/$1"; }

build
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/root" "$work/image/blobs/sha256" "$out"
for program in "${programs[@]}"; do
    binary=${CARGO_TARGET_DIR:-target}/$target/release/$program
    if readelf --program-headers "$binary" | grep -q INTERP; then
        echo "image: error: $program is not static: it asks for an interpreter" >&2
        exit 1
    fi
    install -m 0755 "$binary" "$work/root/$program"
done

pack "$work/root" "$work/layer"
diff_id=$(digest "$work/layer")
gzip --no-name --best "$work/layer"
layer=$(blob "$work/layer.gz")

cat >"$work/config" <<JSON
{"architecture":"$arch","os":"linux","config":{"Entrypoint":["/palisade"],"WorkingDir":"/","Labels":{"org.opencontainers.image.title":"palisade","org.opencontainers.image.version":"$version","org.opencontainers.image.licenses":"Apache-2.0"}},"rootfs":{"type":"layers","diff_ids":["sha256:$diff_id"]}}
JSON
config=$(blob "$work/config")

cat >"$work/manifest" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:$config","size":$(size "$config")},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"sha256:$layer","size":$(size "$layer")}]}
JSON
manifest=$(blob "$work/manifest")

cat >"$work/image/index.json" <<JSON
{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:$manifest","size":$(size "$manifest"),"platform":{"architecture":"$arch","os":"linux"},"annotations":{"io.containerd.image.name":"$name","org.opencontainers.image.ref.name":"$version"}}]}
JSON
echo '{"imageLayoutVersion":"1.0.0"}' >"$work/image/oci-layout"

archive=$out/palisade-$version.tar
pack "$work/image" "$archive"
echo "$name: $archive, $(stat -c %s "$archive") bytes, sha256:$manifest"
