//! Data parallelism around the collectives: gradients averaged, variables made equal.
//!
//! Apart from the groups, since it needs nothing of them but the trait.

use super::ProcessGroup;
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};
use candle_nn::VarMap;
use std::hash::{Hash, Hasher};

/// The variables of a model in an order that is the same on every rank.
///
/// `VarMap::all_vars` returns them in an order that differs from one process to the next, and a mix-up of
/// two variables of one shape would go unnoticed. So a `VarMap` is walked by name, and a list of
/// variables by their age: ranks that build the same model create them in the same order.
pub trait Parameters {
    /// The variables, in that order.
    fn ordered(&self) -> Vec<Var>;
}

impl Parameters for VarMap {
    fn ordered(&self) -> Vec<Var> {
        let data = self.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut named: Vec<_> = data.iter().collect();
        named.sort_unstable_by_key(|(name, _)| *name);
        named.into_iter().map(|(_, var)| var.clone()).collect()
    }
}

impl Parameters for [Var] {
    fn ordered(&self) -> Vec<Var> {
        let mut vars = self.to_vec();
        vars.sort_unstable_by_key(age);
        vars
    }
}

impl Parameters for Vec<Var> {
    fn ordered(&self) -> Vec<Var> {
        self.as_slice().ordered()
    }
}

/// candle numbers tensors as they are made, and shows the number to hashers only.
fn age(var: &Var) -> u64 {
    struct Number(u64);
    impl Hasher for Number {
        fn finish(&self) -> u64 {
            self.0
        }
        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = self.0 << 8 | u64::from(*byte);
            }
        }
        fn write_usize(&mut self, number: usize) {
            self.0 = number as u64;
        }
    }
    let mut number = Number(0);
    var.id().hash(&mut number);
    number.finish()
}

/// Replaces each gradient of `vars` by its average over the ranks, in one collective per dtype.
///
/// Variables without a gradient (running statistics, frozen parameters) stay without; every rank must
/// have gradients of the same variables. With a loss that is a mean over the rank's own samples, ranks of
/// equal batch sizes get the gradient of the mean over all samples; for unequal ones weigh each rank's
/// loss by `local_samples * world_size / all_samples` first.
///
/// # Errors
/// Where the ranks' gradients differ in number, shape or dtype, and where the group fails. The gradients
/// are then as before.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_norm::distributed::{all_reduce_gradients, LocalGroup, ProcessGroup};
/// # fn main() -> candle_core::Result<()> {
/// LocalGroup::run(2, |group| {
///     let w = Var::new(&[1f32], &Device::Cpu)?;
///     let loss = (w.as_tensor() * (2.0 + 2.0 * group.rank() as f64))?;
///     let mut gradients = loss.backward()?;
///     all_reduce_gradients(&mut gradients, &vec![w.clone()], &*group)?;
///     assert_eq!(gradients.get(&w).unwrap().to_vec1::<f32>()?, [3.0]); // of 2 and 4
///     Ok(())
/// })?;
/// # Ok(()) }
/// ```
pub fn all_reduce_gradients(
    gradients: &mut GradStore,
    vars: &(impl Parameters + ?Sized),
    group: &(impl ProcessGroup + ?Sized),
) -> Result<()> {
    let vars: Vec<Var> = vars.ordered().into_iter().filter(|var| gradients.get(var).is_some()).collect();
    let mine: Vec<Tensor> = vars.iter().filter_map(|var| gradients.get(var).cloned()).collect();
    let averaged = flat(&mine, "gradients", |what, all| {
        // Half-precision sums are carried in f32 and rounded once.
        let wide = if all.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let sum = group.all_reduce_sum(what, &all.to_dtype(wide)?)?;
        (sum / group.world_size() as f64)?.to_dtype(all.dtype())
    })?;
    for (var, gradient) in vars.iter().zip(averaged) {
        gradients.insert(var, gradient);
    }
    Ok(())
}

/// Sets `vars`, parameters and running statistics alike, to what they are on rank 0.
///
/// # Errors
/// Where the ranks' variables differ in number, shape or dtype, and where the group fails.
pub fn broadcast_vars(vars: &(impl Parameters + ?Sized), group: &(impl ProcessGroup + ?Sized)) -> Result<()> {
    let vars = vars.ordered();
    let mine: Vec<Tensor> = vars.iter().map(Var::as_detached_tensor).collect();
    let theirs = flat(&mine, "variables", |what, all| group.broadcast(what, all, 0))?;
    for (var, value) in vars.iter().zip(theirs) {
        var.set(&value)?;
    }
    Ok(())
}

/// Applies a collective to all tensors of a dtype (and device) at once, as one flat tensor.
fn flat(tensors: &[Tensor], noun: &str, f: impl Fn(&str, &Tensor) -> Result<Tensor>) -> Result<Vec<Tensor>> {
    let mut results: Vec<Option<Tensor>> = vec![None; tensors.len()];
    // The words cover all tensors, not those of one collective: ranks that differ anywhere find out first.
    let words = format!("{} {noun} of shapes {:016x}", tensors.len(), shapes(tensors));
    while let Some(first) = results.iter().position(Option::is_none) {
        let alike = |t: &Tensor| {
            t.dtype() == tensors[first].dtype() && t.device().same_device(tensors[first].device())
        };
        let together: Vec<usize> = (first..tensors.len()).filter(|i| alike(&tensors[*i])).collect();
        let parts =
            together.iter().map(|i| tensors[*i].detach().flatten_all()).collect::<Result<Vec<_>>>()?;
        let all = f(&words, &Tensor::cat(&parts, 0)?)?;
        let mut start = 0;
        for i in together {
            let tensor = &tensors[i];
            let part = all.narrow(0, start, tensor.elem_count())?;
            // A copy: a view would keep the flat tensor alive as long as any part of it.
            results[i] = Some(part.reshape(tensor.shape())?.force_contiguous()?);
            start += tensor.elem_count();
        }
    }
    Ok(results.into_iter().flatten().collect())
}

/// A digest of shapes and dtypes, the same in every process.
fn shapes(tensors: &[Tensor]) -> u64 {
    let text: String = tensors.iter().map(|t| format!("{:?}{:?};", t.dtype(), t.dims())).collect();
    super::digest(text.as_bytes())
}
