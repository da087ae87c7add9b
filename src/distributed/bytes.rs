//! Tensors in host memory as the bytes of a message, and back.
//!
//! Apart, because the engines that move bytes, over sockets and over MPI, share it.

use super::Kind;
use candle_core::{bail, CpuStorage, DType, Device, Result, Storage, Tensor};

/// The elements of a contiguous tensor in host memory, in this machine's byte order.
pub(super) fn to_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let (storage, layout) = tensor.storage_and_layout();
    // Of none, nothing: such a view may start beyond the end of its storage.
    let start = if tensor.elem_count() == 0 { 0 } else { layout.start_offset() };
    let elements = start..start + tensor.elem_count();
    let Storage::Cpu(storage) = &*storage else {
        bail!("process-group: a message is on {:?}, expected host memory", tensor.device().location())
    };
    let mut bytes = Vec::with_capacity(elements.len() * tensor.dtype().size_in_bytes());
    macro_rules! bytes {
        ($($kind:ident),*) => {
            match storage {
                $(CpuStorage::$kind(v) => {
                    for x in &v[elements] {
                        bytes.extend_from_slice(&x.to_ne_bytes())
                    }
                })*
                _ => bail!("process-group: no messages of dtype {:?}", tensor.dtype()),
            }
        };
    }
    bytes!(F64, F32, F16, BF16, I64, U32, U8);
    Ok(bytes)
}

pub(super) fn from_bytes(bytes: &[u8], dtype: DType, dims: &[usize]) -> Result<Tensor> {
    Tensor::from_raw_buffer(bytes, dtype, dims, &Device::Cpu)
}

/// The result of a collective over the bytes that each rank brought, in rank order: a tensor of `n`
/// elements, or one of `ranks * n`.
pub(super) fn combine<'a>(
    kind: Kind,
    mut brought: impl Iterator<Item = &'a [u8]>,
    dtype: DType,
    n: usize,
) -> Result<Tensor> {
    match kind {
        Kind::Gather => {
            let all = brought.collect::<Vec<_>>().concat();
            from_bytes(&all, dtype, &[all.len() / dtype.size_in_bytes()])
        }
        Kind::Broadcast(root) => match brought.nth(root) {
            Some(bytes) => from_bytes(bytes, dtype, &[n]),
            None => bail!("process-group: broadcast from rank {root}, which is not there"),
        },
        Kind::Sum => {
            let mut tensors = brought.map(|bytes| from_bytes(bytes, dtype, &[n]));
            let Some(first) = tensors.next() else { bail!("process-group: a sum over no ranks") };
            tensors.try_fold(first?, |sum, tensor| sum + tensor?)
        }
    }
}

/// Shape of a collective's result.
pub(super) fn result_dims(kind: Kind, tensor: &Tensor, world_size: usize) -> Vec<usize> {
    let mut dims = tensor.dims().to_vec();
    if kind == Kind::Gather {
        dims.insert(0, world_size);
    }
    dims
}
