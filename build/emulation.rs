//! Compiles the kernels for the host, with the emulation of what they take from CUDA.
//!
//! `CANDLE_NORM_SANITIZE=address,undefined` instruments them: the test programs then need the
//! sanitizer's runtime first, which `LD_PRELOAD` sees to (`ci/sanitize.sh`). `CANDLE_NORM_FAULT` plants a
//! fault in a kernel, for the check that faults are seen. `CANDLE_NORM_RACE=1` compiles the kernels so that
//! every access is watched (`cuda/emulation/race.cpp`, `ci/race.sh`).

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

pub fn compile() -> Result<()> {
    // Not the folder: tables of what the kernels take lie there too. A new kernel is a new module in Rust.
    println!("cargo:rerun-if-changed=src/cuda/entry/module.rs");
    for source in files(Path::new("cuda"), &["cu", "cuh"])?
        .iter()
        .chain(&files(Path::new("cuda/emulation"), &["cpp", "h"])?)
    {
        println!("cargo:rerun-if-changed={}", source.display());
    }
    for variable in ["CANDLE_NORM_SANITIZE", "CANDLE_NORM_FAULT", "CANDLE_NORM_RACE"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let race = std::env::var("CANDLE_NORM_RACE").is_ok_and(|race| race == "1");
    let mut machine = compiler();
    machine.file("cuda/emulation/run.cpp").file("cuda/emulation/race.cpp");
    let mut build = compiler();
    if race {
        machine.define("NORM_RACE", None);
        // Every access of the kernels becomes a call of race.cpp's; and for once products and sums are
        // contracted, as nvcc does.
        build.opt_level(1).flag("-fsanitize=thread").flag("-ffp-contract=fast");
        if has_fma() {
            build.flag("-mfma");
        }
    } else {
        build.flag("-ffp-contract=off");
    }
    sanitize(&mut build);
    sanitize(&mut machine);
    if let Ok(fault) = std::env::var("CANDLE_NORM_FAULT") {
        build.define(&format!("NORM_FAULT_{}", fault.to_uppercase()), None);
    }
    for file in files(Path::new("cuda"), &["cu"])? {
        // g++ and clang++ take a .cu file for C++ when told so.
        build.file(as_cpp(&file)?);
    }
    build.file("cuda/emulation/agree.cpp").file("cuda/emulation/planted.cpp");
    // Kernels are found by the names under which they register; nothing else refers to them.
    build.link_lib_modifier("+whole-archive").compile("norm_emulation");
    machine.link_lib_modifier("+whole-archive").compile("norm_emulation_machine");
    Ok(())
}

fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).include("cuda").define("NORM_EMULATION", None);
    // Kernels view memory as 16-byte vectors and as elements; nvcc lets them.
    build.flag("-fno-strict-aliasing");
    build.flag_if_supported("-Wno-unknown-pragmas").flag_if_supported("-Wno-unused-parameter");
    build
}

/// Whether the machine that compiles, and will run the tests, has to be told to fuse.
fn has_fma() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

fn sanitize(build: &mut cc::Build) {
    let Ok(sanitizers) = std::env::var("CANDLE_NORM_SANITIZE") else { return };
    build.flag(format!("-fsanitize={sanitizers}")).flag("-fno-omit-frame-pointer").flag("-g1");
    build.flag("-fno-sanitize-recover=all");
    // The runtimes, of the same compiler; rustc links without its defaults.
    if sanitizers.contains("address") {
        println!("cargo:rustc-link-lib=dylib=asan");
    }
    if sanitizers.contains("undefined") {
        println!("cargo:rustc-link-lib=dylib=ubsan");
    }
}

fn files(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in folder.read_dir().with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extensions.iter().any(|one| extension == *one)) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A file of one line that includes the kernels: `.cpp` by name, so that every compiler takes it.
fn as_cpp(file: &Path) -> Result<PathBuf> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let stem = file.file_stem().context("a kernel file without a name")?;
    let cpp = out.join(stem).with_extension("cpp");
    let text = format!("#include \"{}\"\n", file.canonicalize()?.display());
    if std::fs::read_to_string(&cpp).ok().as_ref() != Some(&text) {
        std::fs::write(&cpp, text)?;
    }
    Ok(cpp)
}
