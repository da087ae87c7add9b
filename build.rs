//! Compiles the kernels of `cuda/` where a feature asks for them, and does nothing otherwise.

fn main() -> anyhow::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=build");
    #[cfg(feature = "cuda")]
    cuda::compile()?;
    #[cfg(feature = "cuda-emulation")]
    emulation::compile()?;
    Ok(())
}

#[cfg(feature = "cuda")]
#[path = "build/cuda.rs"]
mod cuda;

#[cfg(feature = "cuda-emulation")]
#[path = "build/emulation.rs"]
mod emulation;
