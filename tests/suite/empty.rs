//! Tensors without elements, as PyTorch treats them: empty outputs, zero gradients, nothing moved.
//!
//! Where PyTorch fails (instance norm of an empty batch, batch norm of no channels) the same rule holds here.

use crate::case::{Case, Norm};
use crate::common::values;
use candle_core::{DType, Result};

fn each() -> Vec<Case> {
    let mut cases = Vec::new();
    for dims in
        [&[0usize, 6, 3, 5][..], &[2, 6, 0, 5], &[2, 6, 3, 0], &[0, 6, 1], &[0, 6], &[2, 0, 3], &[0, 0, 0]]
    {
        let norms = [
            Norm::Batch { training: true },
            Norm::Batch { training: false },
            Norm::Instance { use_input_stats: true },
            Norm::Instance { use_input_stats: false },
            Norm::Group { groups: 2 },
            Norm::Layer { normalized: 1 },
            Norm::Layer { normalized: 2 },
            Norm::Rms { normalized: 1 },
        ];
        for norm in norms {
            let own_instance = norm == Norm::Instance { use_input_stats: true };
            if own_instance && dims[2..].iter().product::<usize>() == 1 {
                continue; // An error, empty or not: no spatial dimension to normalize over.
            }
            let mut case = Case::new(norm, dims);
            if matches!(norm, Norm::Batch { .. } | Norm::Instance { .. }) {
                case.running = Some(DType::F32);
            }
            cases.push(case.clone());
            // Cut out of something as empty, it starts beyond the end of its storage.
            case.layout.narrow = Some((dims.len() - 1, 2, 1));
            cases.push(case);
        }
    }
    cases
}

#[test]
fn empty_outputs_zero_gradients_and_untouched_running_statistics() -> Result<()> {
    for case in each() {
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let case = Case { dtype, ..case.clone() };
            let args = case.random();
            let got = case.run(&args).map_err(|e| e.context(format!("{case:?}")))?;
            assert_eq!((got.y.dims(), got.y.dtype()), (&case.dims[..], case.dtype), "{case:?}");
            assert_eq!(got.dx.expect("dx").dims(), case.dims, "{case:?}");
            let params: usize = case.param_dims().iter().product();
            for gradient in [got.dweight, got.dbias].into_iter().flatten() {
                assert_eq!(values(&gradient), vec![0.0; params], "{case:?}");
            }
            if let Some(running) = got.running {
                assert_eq!(Some(running), got.rounded.running, "{case:?}");
            }
        }
    }
    Ok(())
}
