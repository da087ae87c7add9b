//! Compiles the kernels for the host, with the emulation of what they take from CUDA.
//!
//! `CANDLE_NORM_SANITIZE=address,undefined` instruments them: the test programs then need the
//! sanitizer's runtime first, which `LD_PRELOAD` sees to (`ci/sanitize.sh`). `CANDLE_NORM_FAULT` plants a
//! fault in a kernel, for the check that faults are seen.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

pub fn compile() -> Result<()> {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=CANDLE_NORM_SANITIZE");
    println!("cargo:rerun-if-env-changed=CANDLE_NORM_FAULT");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).include("cuda").define("NORM_EMULATION", None);
    // Kernels view memory as 16-byte vectors and as elements; nvcc lets them.
    build.flag("-fno-strict-aliasing").flag("-ffp-contract=off");
    build.flag_if_supported("-Wno-unknown-pragmas").flag_if_supported("-Wno-unused-parameter");
    if let Ok(sanitizers) = std::env::var("CANDLE_NORM_SANITIZE") {
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
    if let Ok(fault) = std::env::var("CANDLE_NORM_FAULT") {
        build.define(&format!("NORM_FAULT_{}", fault.to_uppercase()), None);
    }
    for file in kernels(Path::new("cuda"))? {
        // g++ and clang++ take a .cu file for C++ when told so.
        build.file(as_cpp(&file)?);
    }
    build.file("cuda/emulation/run.cpp").file("cuda/emulation/agree.cpp");
    // Kernels are found by the names under which they register; nothing else refers to them.
    build.link_lib_modifier("+whole-archive").compile("norm_emulation");
    Ok(())
}

fn kernels(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in folder.read_dir().with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
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
