//! `cuda/*.cu` to PTX with nvcc, at one compute capability, by `bindgen_cuda`; and that to machine code, so that a
//! module loads in milliseconds.
//!
//! Kept separate from `build.rs` to be compiled with feature `cuda` alone. It finds the toolkit and the
//! capability itself, because `bindgen_cuda` panics where it finds none, and says what it looked for.
//! `bindgen_cuda` compiles a `.cu` file again when the file alone is newer than its PTX; what else the
//! PTX depends on is kept in a stamp file, and a changed stamp deletes what came of it first.

use anyhow::{bail, Context, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, fs, thread};

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

    let started = Instant::now();
    // The builder asks the environment for the capability when it is made, and starts `nvcc` by name.
    env::set_var("CUDA_COMPUTE_CAP", capability.to_string());
    env::set_var("PATH", path_with(&nvcc)?);
    let mut builder = bindgen_cuda::Builder::default().kernel_paths(kernels.clone()).include_paths(headers);
    builder.cuda_root(root);
    let compiled = OPTIONS.into_iter().fold(builder, |builder, option| builder.arg(option)).build_ptx();
    compiled.map_err(|error| anyhow::anyhow!("candle-norm: {error:?}"))?;
    let assembled = assemble_all(&nvcc, capability, &kernels, &out)?;
    if assembled > 0 {
        let seconds = started.elapsed().as_secs_f64();
        fs::write(out.join("seconds"), format!("{assembled} files in {seconds:.0} s\n"))?;
    }
    println!("cargo:rustc-env=CANDLE_NORM_COMPUTE_CAP={capability}");
    fs::write(out.join("kernels.rs"), table(&kernels)).context("cannot write kernels.rs")
}

/// Makes machine code of the PTX that has none yet, as many files at a time as cargo has jobs; how many those
/// were.
fn assemble_all(nvcc: &Path, capability: u32, kernels: &[PathBuf], out: &Path) -> Result<usize> {
    let ptx = |kernel: &Path| out.join(stem(kernel)).with_extension("ptx");
    let stale: Vec<_> =
        kernels.iter().filter(|kernel| !up_to_date(&ptx(kernel), &image(kernel, out))).collect();
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some(kernel) = stale.get(next.fetch_add(1, Ordering::Relaxed)) {
            assemble(nvcc, capability, &ptx(kernel), &image(kernel, out))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.min(stale.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| match worker.join() {
            Ok(done) => done,
            Err(_) => bail!("candle-norm: a thread panicked while it ran nvcc"),
        })
    })?;
    Ok(stale.len())
}

/// PTX and the machine code that it is for `capability`, in one file that a driver chooses from.
fn assemble(nvcc: &Path, capability: u32, ptx: &Path, image: &Path) -> Result<()> {
    let mut command = Command::new(nvcc);
    command.arg("--fatbin");
    command.arg(format!("-gencode=arch=compute_{capability},code=[sm_{capability},compute_{capability}]"));
    // Under another name until it is whole: an interrupted build leaves nothing that looks like a result.
    let partial = image.with_extension("partial");
    let output = command.arg("-o").arg(&partial).arg(ptx).output();
    let output = output.with_context(|| format!("candle-norm: cannot run {}", nvcc.display()))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("candle-norm: nvcc cannot assemble {}:\n{}", ptx.display(), String::from_utf8_lossy(&said))
    }
    fs::rename(&partial, image).with_context(|| format!("candle-norm: nvcc wrote no {}", image.display()))
}

fn up_to_date(ptx: &Path, image: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|about| about.modified()).ok();
    matches!((time(ptx), time(image)), (Some(ptx), Some(image)) if ptx <= image)
}

fn stem(kernel: &Path) -> &str {
    kernel.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default()
}

fn image(kernel: &Path, out: &Path) -> PathBuf {
    out.join(stem(kernel)).with_extension("fatbin")
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

/// All that an image depends on besides its `.cu` file.
fn stamp(nvcc: &Path, root: &Path, capability: u32, headers: &[PathBuf]) -> Result<String> {
    let mut stamp = format!("{capability} {OPTIONS:?} {}\n{}", root.display(), output(nvcc, "--version")?);
    for header in headers {
        let text = fs::read_to_string(header).with_context(|| format!("cannot read {}", header.display()))?;
        stamp.push_str(&text);
    }
    Ok(stamp)
}

fn discard_stale(out: &Path, stamp: &str) -> Result<()> {
    let file = out.join("kernels.stamp");
    if fs::read_to_string(&file).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    for entry in fs::read_dir(out)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "fatbin" || extension == "ptx") {
            fs::remove_file(&path).with_context(|| format!("cannot delete {}", path.display()))?;
        }
    }
    fs::write(&file, stamp).context("cannot write kernels.stamp")
}

/// PATH with nvcc's folder in front.
fn path_with(nvcc: &Path) -> Result<OsString> {
    let old = env::var_os("PATH").unwrap_or_default();
    let folder = nvcc.parent().map(Path::to_path_buf);
    env::join_paths(folder.into_iter().chain(env::split_paths(&old))).context("PATH")
}

/// A Rust table of all images by stem.
fn table(kernels: &[PathBuf]) -> String {
    let rows = kernels.iter().map(|kernel| {
        let stem = stem(kernel);
        let image = format!("include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\"))");
        format!("    ({stem:?}, {image}),\n")
    });
    format!("pub const ALL: &[(&str, &[u8])] = &[\n{}];\n", rows.collect::<String>())
}
