//! Compiles the kernels of `cuda/` where a feature asks for them, and does nothing otherwise.

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    #[cfg(feature = "cuda")]
    cuda::compile()?;
    Ok(())
}

#[cfg(feature = "cuda")]
#[path = "build/cuda.rs"]
mod cuda;
