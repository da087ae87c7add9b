//! `cuda/*.cu` to PTX with nvcc, at one compute capability, by `bindgen_cuda`.
//!
//! Apart from `build.rs`, to be compiled with feature `cuda` alone. It finds the toolkit and the
//! capability itself, because `bindgen_cuda` panics where it finds none, and says what it looked for.
//! `bindgen_cuda` compiles a `.cu` file again when the file alone is newer than its PTX; what else the
//! PTX depends on is kept in a stamp file, and a changed stamp deletes the PTX first.

use anyhow::{bail, Context, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Variables that may name the toolkit's folder, in the order in which they are asked.
const ROOT_VARIABLES: [&str; 4] = ["CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR", "CUDA_HOME"];
const USUAL_ROOTS: [&str; 4] = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr"];
/// Headers the kernels include.
const HEADERS: [&str; 3] = ["cuda.h", "cuda_fp16.h", "cuda_bf16.h"];
const OPTIONS: [&str; 2] = ["-std=c++17", "-O3"];

pub fn compile() -> Result<()> {
    for variable in ROOT_VARIABLES.iter().chain(&["CUDA_COMPUTE_CAP", "NVCC_CCBIN"]) {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=cuda");
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR for build scripts")?);
    let (kernels, headers) = (files("cu")?, files("cuh")?);

    let roots = roots();
    let nvcc = find_nvcc(&roots)?;
    let root = find_headers(&roots, &nvcc)?;
    let capability = capability()?;
    check_target(&nvcc, capability)?;
    discard_stale(&out, &stamp(&nvcc, &root, capability, &headers)?)?;

    // The builder asks the environment for the capability when it is made, and starts `nvcc` by name.
    env::set_var("CUDA_COMPUTE_CAP", capability.to_string());
    env::set_var("PATH", path_with(&nvcc)?);
    let mut builder = bindgen_cuda::Builder::default().kernel_paths(kernels.clone()).include_paths(headers);
    builder.cuda_root(root);
    let compiled = OPTIONS.into_iter().fold(builder, |builder, option| builder.arg(option)).build_ptx();
    compiled.map_err(|error| anyhow::anyhow!("candle-norm: {error:?}"))?;

    println!("cargo:rustc-env=CANDLE_NORM_COMPUTE_CAP={capability}");
    fs::write(out.join("ptx.rs"), table(&kernels)).context("cannot write ptx.rs")
}

/// Files of `cuda/` with this extension, sorted.
fn files(extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir("cuda").context("candle-norm: cannot read its folder cuda/")?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let mut paths: Vec<_> =
        paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    paths.sort();
    Ok(paths)
}

/// Folders that may hold a toolkit, each with where its name comes from.
fn roots() -> Vec<(String, PathBuf)> {
    let named = ROOT_VARIABLES.iter().filter_map(|variable| {
        let root = PathBuf::from(env::var_os(variable)?);
        Some((format!("{variable}={}", root.display()), root))
    });
    named.chain(USUAL_ROOTS.iter().map(|root| (root.to_string(), root.into()))).collect()
}

fn find_nvcc(roots: &[(String, PathBuf)]) -> Result<PathBuf> {
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join(&name));
    let in_roots = roots.iter().map(|(_, root)| root.join("bin").join(&name));
    on_path.chain(in_roots).find(|nvcc| nvcc.is_file()).with_context(|| {
        format!(
            "candle-norm: feature `cuda` needs nvcc, the CUDA compiler, and found none.\n\
             Looked in PATH and in bin/ of: {}.\n\
             Install the CUDA toolkit and add its bin/ to PATH, or set CUDA_PATH to its folder.",
            names(roots)
        )
    })
}

fn find_headers(roots: &[(String, PathBuf)], nvcc: &Path) -> Result<PathBuf> {
    // nvcc's own toolkit after the variables, before folders that may hold another version.
    let own = nvcc.canonicalize().ok().and_then(|nvcc| Some(nvcc.parent()?.parent()?.to_path_buf()));
    let own = own.map(|root| (root.display().to_string(), root));
    let named = roots.len() - USUAL_ROOTS.len();
    let roots: Vec<_> = roots[..named].iter().cloned().chain(own).chain(roots[named..].to_vec()).collect();
    let complete = |root: &Path| HEADERS.iter().all(|header| root.join("include").join(header).is_file());
    match roots.iter().find(|(_, root)| complete(root)) {
        Some((_, root)) => Ok(root.clone()),
        None => bail!(
            "candle-norm: feature `cuda` needs the CUDA headers {} and found no folder with all of them.\n\
             Looked in include/ of: {}.\n\
             Set CUDA_PATH to the folder of the CUDA toolkit.",
            HEADERS.join(", "),
            names(&roots)
        ),
    }
}

fn names(roots: &[(String, PathBuf)]) -> String {
    roots.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ")
}

/// Compute capability to compile for: 90 for 9.0.
fn capability() -> Result<u32> {
    let how = "Set CUDA_COMPUTE_CAP to the compute capability of the GPU to build for, 90 for 9.0.";
    let (source, text) = match env::var("CUDA_COMPUTE_CAP") {
        Ok(text) => ("CUDA_COMPUTE_CAP", text),
        Err(_) => {
            let query = ["--query-gpu=compute_cap", "--format=csv,noheader"];
            match Command::new("nvidia-smi").args(query).output() {
                Ok(answer) if answer.status.success() => {
                    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
                    ("nvidia-smi", text.lines().next().unwrap_or_default().to_string())
                }
                _ => bail!(
                    "candle-norm: feature `cuda` needs a compute capability to compile for: \
                     CUDA_COMPUTE_CAP is not set and nvidia-smi names no GPU.\n{how}"
                ),
            }
        }
    };
    let digits: String = text.trim().chars().filter(|c| *c != '.').collect();
    match digits.parse() {
        Ok(capability) if capability >= 10 => Ok(capability),
        _ => bail!("candle-norm: {source} names the compute capability {text:?}.\n{how}"),
    }
}

fn check_target(nvcc: &Path, capability: u32) -> Result<()> {
    let codes = output(nvcc, "--list-gpu-code")?;
    if codes.lines().any(|code| code.trim() == format!("sm_{capability}")) {
        return Ok(());
    }
    bail!(
        "candle-norm: {} does not compile for compute capability {capability}, only for {}.\n\
         Set CUDA_COMPUTE_CAP to one of them, or use another version of the CUDA toolkit.",
        nvcc.display(),
        codes.split_whitespace().collect::<Vec<_>>().join(", ")
    )
}

fn output(nvcc: &Path, argument: &str) -> Result<String> {
    let asked = Command::new(nvcc).arg(argument).output();
    let answer = asked.with_context(|| format!("candle-norm: cannot run {}", nvcc.display()))?;
    if !answer.status.success() {
        bail!("candle-norm: {} {argument} failed with {}", nvcc.display(), answer.status)
    }
    Ok(String::from_utf8_lossy(&answer.stdout).into_owned())
}

/// All that PTX depends on besides its `.cu` file.
fn stamp(nvcc: &Path, root: &Path, capability: u32, headers: &[PathBuf]) -> Result<String> {
    let mut stamp = format!("{capability} {OPTIONS:?} {}\n{}", root.display(), output(nvcc, "--version")?);
    for header in headers {
        let text = fs::read_to_string(header).with_context(|| format!("cannot read {}", header.display()))?;
        stamp.push_str(&text);
    }
    Ok(stamp)
}

fn discard_stale(out: &Path, stamp: &str) -> Result<()> {
    let file = out.join("ptx.stamp");
    if fs::read_to_string(&file).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    for entry in fs::read_dir(out)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "ptx") {
            fs::remove_file(&path).with_context(|| format!("cannot delete {}", path.display()))?;
        }
    }
    fs::write(&file, stamp).context("cannot write ptx.stamp")
}

/// PATH with nvcc's folder in front.
fn path_with(nvcc: &Path) -> Result<OsString> {
    let old = env::var_os("PATH").unwrap_or_default();
    let folder = nvcc.parent().map(Path::to_path_buf);
    env::join_paths(folder.into_iter().chain(env::split_paths(&old))).context("PATH")
}

/// A Rust table of all PTX by stem.
fn table(kernels: &[PathBuf]) -> String {
    let rows = kernels.iter().filter_map(|kernel| {
        let stem = kernel.file_stem()?.to_str()?;
        let ptx = format!("include_str!(concat!(env!(\"OUT_DIR\"), \"/{stem}.ptx\"))");
        Some(format!("    ({stem:?}, {ptx}),\n"))
    });
    format!("pub const ALL: &[(&str, &str)] = &[\n{}];\n", rows.collect::<String>())
}
