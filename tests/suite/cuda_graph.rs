//! Every op captured in a CUDA graph and replayed on new data: what an op that synchronized, copied
//! from the host or allocated otherwise than in stream order could not do.
//!
//! Compiled with feature `cuda`; it has something to test when the device under test is a GPU.

use crate::common::{bits, data, device, tensor, DTYPES};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, Var};
use candle_norm::__bench::{Kind, RecordedOp};
use candle_norm::functional as f;
use cudarc::driver::sys;

const EPS: f64 = 1e-5;

type Op<'a> = dyn Fn(&Tensor) -> Result<Tensor> + 'a;

fn gpu() -> Option<&'static CudaDevice> {
    match device() {
        Device::Cuda(gpu) => Some(gpu),
        _ => None,
    }
}

/// Records what `op` enqueues, then replays it once for each further `values` of x.
///
/// Returns what the replays left in the output. The warm-up call has run on the first values.
fn replayed(gpu: &CudaDevice, x: &Var, values: &[Tensor], op: &Op) -> Result<Vec<Vec<u64>>> {
    let error = |e| candle_core::Error::wrap(e);
    candle_norm::cuda::warmup(device())?;
    let stream = gpu.cuda_stream();
    stream.synchronize().map_err(error)?;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(error)?;
    let y = op(x);
    // The output is allocated by the graph, and freed by its next launch.
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags);
    let (y, graph) = (y?, graph.map_err(error)?.expect("a graph"));
    let mut outputs = Vec::new();
    for values in values {
        x.set(values)?;
        graph.launch().map_err(error)?;
        outputs.push(bits(&y));
    }
    Ok(outputs)
}

/// Replays give what calls give, bit for bit.
fn captures(name: &str, dims: &[usize], op: &Op) -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for dtype in DTYPES {
        let n = dims.iter().product();
        let values = [1, 2, 3].map(|seed| tensor(&data(seed, n, 0.5, 2.0), dims, dtype));
        let values: Vec<Tensor> = values.into_iter().collect::<Result<_>>()?;
        let x = Var::from_tensor(&values[0].copy()?)?;
        let expected = values.iter().map(|v| op(v).map(|y| bits(&y))).collect::<Result<Vec<_>>>()?;
        assert_eq!(replayed(gpu, &x, &values, op)?, expected, "{name} {dims:?} {dtype:?}");
    }
    Ok(())
}

fn param(seed: u64, n: usize) -> Result<Tensor> {
    tensor(&data(seed, n, 1.0, 0.3), &[n], DType::F32)
}

#[test]
fn forward() -> Result<()> {
    // Rows in registers, rows over blocks, and few long rows, which are split.
    for (rows, width) in [(64, 96), (4, 20_000), (1, 300_000)] {
        let (w, b) = (param(7, width)?, param(8, width)?);
        captures("layer norm", &[rows, width], &|x| f::layer_norm(x, &[width], Some(&w), Some(&b), EPS))?;
        captures("RMS norm", &[rows, width], &|x| f::rms_norm(x, &[width], Some(&w), EPS))?;
    }
    let (w, b) = (param(7, 8)?, param(8, 8)?);
    captures("group norm", &[2, 8, 33, 17], &|x| f::group_norm(x, 2, Some(&w), Some(&b), EPS))?;
    captures("instance norm", &[2, 8, 33, 17], &|x| {
        f::instance_norm(x, None, None, Some(&w), Some(&b), true, 0.1, EPS)
    })?;
    for dims in [[4, 8, 9, 5], [64, 8, 1, 1]] {
        captures("batch norm", &dims, &|x| f::batch_norm(x, None, None, Some(&w), Some(&b), true, 0.1, EPS))?;
    }
    Ok(())
}

#[test]
fn backward() -> Result<()> {
    let (w, b) = (Var::from_tensor(&param(7, 8)?)?, Var::from_tensor(&param(8, 8)?)?);
    // The op's own forward and backward, without candle's ops around a `Tensor::backward`.
    let gradient = |kind, x: &Tensor| -> Result<Tensor> {
        let dy = x.detach();
        let x = Var::from_tensor(&dy.copy()?)?;
        let mut gradients = RecordedOp::new(kind, &x, Some(&w), Some(&b), EPS)?.backward(&dy)?;
        Ok(gradients.remove(0).expect("a gradient of x"))
    };
    captures("batch norm", &[4, 8, 9, 5], &|x| gradient(Kind::Batch, x))?;
    captures("group norm", &[4, 8, 9, 5], &|x| gradient(Kind::Groups(2), x))?;
    captures("layer norm", &[40, 8], &|x| gradient(Kind::Layer { center: true }, x))
}

#[test]
fn running_statistics_move_with_every_replay() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let dims = [4, 8, 9, 5];
    let values = [1, 2, 3].map(|seed| tensor(&data(seed, 1440, 0.5, 2.0), &dims, DType::F32));
    let values: Vec<Tensor> = values.into_iter().collect::<Result<_>>()?;
    let fresh =
        || -> Result<(Var, Var)> { Ok((Var::from_tensor(&param(5, 8)?)?, Var::from_tensor(&param(6, 8)?)?)) };
    let train = |x: &Tensor, (mean, var): &(Var, Var)| {
        f::batch_norm(x, Some(mean), Some(var), None, None, true, 0.1, EPS)
    };
    let called = fresh()?;
    for x in &values {
        train(x, &called)?;
    }
    let captured = fresh()?;
    let x = Var::from_tensor(&values[0].copy()?)?;
    // Recording runs nothing: the statistics move at the replays alone.
    replayed(gpu, &x, &values, &|x| train(x, &captured))?;
    assert_eq!(bits(&captured.0), bits(&called.0));
    assert_eq!(bits(&captured.1), bits(&called.1));
    Ok(())
}
