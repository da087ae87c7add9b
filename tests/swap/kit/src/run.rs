//! One run of a model: seeded weights, made as the model asks for them, and seeded inputs.
//!
//! A value depends on the process's seed, its name, its shape and nothing else. Both sides and both dtypes get the same numbers:
//! they are drawn in f32.

use candle_core::{bail, DType, Device, Result, Shape, Tensor, Var};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_nn::Init;
use rand::{rngs::StdRng, Rng, SeedableRng};
use rand_distr::StandardNormal;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Of every language model here.
pub const VOCABULARY: usize = 50;

static SEED: AtomicU64 = AtomicU64::new(0);

/// Other values from here on, in the whole process.
pub fn set_seed(seed: u64) {
    SEED.store(seed, Ordering::Relaxed);
}

type Variables = Arc<Mutex<BTreeMap<String, Var>>>;

/// Of a name and a shape.
type Predicate = fn(&str, &[usize]) -> bool;

pub struct Run {
    pub vb: VarBuilder<'static>,
    pub dtype: DType,
    variables: Variables,
    absent: Arc<Mutex<Predicate>>,
    inputs: Cell<usize>,
}

impl Run {
    pub fn new(dtype: DType) -> Self {
        let variables = Variables::default();
        let absent: Arc<Mutex<Predicate>> = Arc::new(Mutex::new(|_, _| false));
        let backend = Box::new(Seeded(variables.clone(), absent.clone()));
        let vb = VarBuilder::from_backend(backend, dtype, Device::Cpu);
        Self { vb, dtype, variables, absent, inputs: Cell::new(0) }
    }

    /// The weights that the model has asked for.
    pub fn variables(&self) -> BTreeMap<String, Var> {
        self.variables.lock().unwrap().clone()
    }

    /// Weights that the checkpoint has not: some models take what they find.
    pub fn without(&self, absent: Predicate) -> &Self {
        *self.absent.lock().unwrap() = absent;
        self
    }

    /// A weight that the checkpoint has: some models look before they ask.
    pub fn has(&self, name: &str, shape: impl Into<Shape>) -> Result<()> {
        self.vb.get(shape.into(), name).map(drop)
    }

    /// `[1, n]`: different tokens of the vocabulary, without 0, which pads.
    pub fn tokens(&self, n: usize) -> Result<Tensor> {
        let tokens: Vec<u32> = (0..n).map(|i| 1 + (i * 7 % (VOCABULARY - 1)) as u32).collect();
        Tensor::from_vec(tokens, (1, n), &Device::Cpu)
    }

    /// Normal numbers: others at each call.
    pub fn noise(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        self.inputs.set(self.inputs.get() + 1);
        let shape = shape.into();
        let values = normal(&format!("input {}", self.inputs.get()), shape.elem_count());
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(self.dtype)
    }

    /// Two images.
    pub fn images(&self, size: usize) -> Result<Tensor> {
        self.noise((2, 3, size, size))
    }
}

pub(crate) fn normal(name: &str, n: usize) -> Vec<f32> {
    // FNV-1a.
    let hash = name.bytes().fold(0xcbf29ce484222325, |h: u64, b| (h ^ b as u64).wrapping_mul(0x100000001b3));
    let seed = hash.wrapping_add(SEED.load(Ordering::Relaxed));
    StdRng::seed_from_u64(seed).sample_iter(StandardNormal).take(n).collect()
}

/// Weights of a trained network's size: neither the initial ones, whose zeros and ones hide a forgotten
/// parameter, nor ones that let activations grow.
pub(crate) fn weights(name: &str, shape: &Shape, init: Init) -> Vec<f32> {
    let leaf = name.rsplit('.').next().unwrap_or(name);
    let mut values = normal(name, shape.elem_count());
    // A convolution's or a matrix's inputs: all but the first dimension.
    let inputs: usize = shape.dims().iter().skip(1).product();
    let (mean, deviation) = match init {
        _ if leaf == "running_var" => (1.0, 0.1),
        Init::Const(c) if c != 0.0 => (c as f32, 0.1),
        _ if shape.rank() >= 2 => (0.0, (inputs as f32).powf(-0.5)),
        _ if leaf.ends_with("weight") || leaf.ends_with("gamma") => (1.0, 0.1),
        _ => (0.0, 0.1),
    };
    // A variance stays positive.
    let limit = if leaf == "running_var" { 5.0 } else { f32::INFINITY };
    values.iter_mut().for_each(|v| *v = mean + deviation * v.clamp(-limit, limit));
    values
}

struct Seeded(Variables, Arc<Mutex<Predicate>>);

impl SimpleBackend for Seeded {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if shape.elem_count() == 0 || (self.1.lock().unwrap())(name, shape.dims()) {
            bail!("there is no {name}")
        }
        let mut variables = self.0.lock().unwrap();
        if !variables.contains_key(name) {
            let value = Tensor::from_vec(weights(name, &shape, init), &shape, device)?;
            variables.insert(name.to_string(), Var::from_tensor(&value.to_dtype(dtype)?)?);
        }
        let variable = &variables[name];
        if variable.shape() != &shape {
            bail!("{name} is asked for as {shape:?} and was {:?}", variable.shape())
        }
        variable.as_tensor().to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> Result<Tensor> {
        match self.0.lock().unwrap().get(name) {
            Some(variable) => variable.as_tensor().to_dtype(dtype),
            None => bail!("{name} is asked for without a shape"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.lock().unwrap().contains_key(name)
    }
}
