//! Builds the eBPF object and hands its path to `include_bytes!` in `load.rs`.
//!
//! The eBPF target needs `core` built from source: either by a rustup nightly with `rust-src`, or
//! by Debian's `cargo-web`, `rustc-web` and `rust-web-src` (a stable compiler, told to allow
//! `build-std`).

use std::{
    env,
    error::Error,
    path::{Path, PathBuf},
    process::Command,
};

const HELP: &str = "the eBPF programs need a Rust toolchain that can build `core`, and bpf-linker: \
    run `make setup`, or install by hand either Debian's cargo-web, rustc-web and rust-web-src \
    or a rustup nightly with rust-src, and `cargo install bpf-linker`";

fn main() -> Result<(), Box<dyn Error>> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let source = manifest.join("../ebpf");
    for path in ["../ebpf", "../abi/src"] {
        println!("cargo::rerun-if-changed={}", manifest.join(path).display());
    }
    println!("cargo::rerun-if-env-changed=PATH");
    let target = PathBuf::from(env::var("OUT_DIR")?).join("ebpf");
    let root = manifest.join("../..").canonicalize()?;
    build(&source, &target, &root)?;
    let object = target.join("bpfel-unknown-none/release/palisade-ebpf");
    println!("cargo::rustc-env=PALISADE_EBPF_OBJECT={}", object.display());
    Ok(())
}

fn build(source: &Path, target: &Path, root: &Path) -> Result<(), Box<dyn Error>> {
    let mut command = toolchain().ok_or(HELP)?;
    command
        .current_dir(source)
        .args(["build", "--locked", "--release", "-Z", "build-std=core"])
        .args(["--target", "bpfel-unknown-none", "--target-dir"])
        .arg(target)
        .args(["--config", &remapped(root)])
        .env("PATH", search_path(root)?);
    // What cargo tells this build script is about the host's build, not about this one.
    for (name, _) in env::vars() {
        let about_host = name.starts_with("CARGO_") && name != "CARGO_HOME";
        // Clippy, too, comes as a wrapper around the compiler.
        let wrapper = name.ends_with("_WRAPPER") || name == "CLIPPY_ARGS";
        if about_host || wrapper || matches!(name.as_str(), "RUSTFLAGS" | "RUSTDOC") {
            command.env_remove(name);
        }
    }
    let output = command.output().map_err(|error| format!("{HELP} ({error})"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(format!("building the eBPF programs failed; {HELP}\n{message}").into());
    }
    Ok(())
}

/// The object names its sources, and must not differ from machine to machine because of it.
fn remapped(root: &Path) -> String {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let prefixes = [(Some(root.to_owned()), "/palisade"), (cargo, "/cargo")];
    let flags: Vec<String> = prefixes
        .iter()
        .filter_map(|(from, to)| {
            Some(format!("{:?}", format!("--remap-path-prefix={}={to}", from.as_ref()?.display())))
        })
        .collect();
    format!("target.bpfel-unknown-none.rustflags=[{}]", flags.join(","))
}

/// `cargo` of a toolchain that builds `core`: rustup's nightly where it has the source, else
/// Debian's.
fn toolchain() -> Option<Command> {
    if nightly_has_source() {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo"]);
        command.env_remove("RUSTC");
        return Some(command);
    }
    let debian_source = Path::new("/usr/lib/rustlib/src/rust/library/core");
    if debian_source.exists() && Path::new("/usr/bin/cargo").exists() {
        let mut command = Command::new("/usr/bin/cargo");
        command.env("RUSTC", "/usr/bin/rustc").env("RUSTC_BOOTSTRAP", "1");
        return Some(command);
    }
    None
}

fn nightly_has_source() -> bool {
    let Ok(output) =
        Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output()
    else {
        return false;
    };
    let sysroot = String::from_utf8_lossy(&output.stdout);
    output.status.success()
        && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").exists()
}

/// The search path with the places where `make setup` puts `bpf-linker`.
fn search_path(root: &Path) -> Result<std::ffi::OsString, Box<dyn Error>> {
    let path = env::var_os("PATH").unwrap_or_default();
    let own = root.join(".tools/bin");
    Ok(env::join_paths(std::iter::once(own).chain(env::split_paths(&path)))?)
}
