//! A call of a norm as a value: which function, shape, dtypes, layouts and flags.
//!
//! Golden cases, random cases and hand-picked ones all run through it, so that each is compared in
//! full: output, every gradient, running statistics, dtypes and shapes.

use crate::common::{data, on_device, tensor, values};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Activation;
use candle_norm::functional::{self as f, fused};

/// What stands around a norm; a case has of it what its function takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fusion {
    /// dtype of a residual that is added before.
    pub residual: Option<DType>,
    /// Added to the weight.
    pub offset: f64,
    /// Weight and bias are scale and shift of each sample.
    pub modulated: bool,
    pub activation: Option<Activation>,
    pub skip: bool,
    /// Of RMS norm, before the norm or behind it.
    pub gate: Option<Gate>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    Before,
    After,
}

/// The five functions, with the arguments that change what they compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    Batch {
        training: bool,
    },
    Instance {
        use_input_stats: bool,
    },
    Layer {
        normalized: usize,
    },
    Group {
        groups: usize,
    },
    Rms {
        normalized: usize,
    },
    /// Layer or RMS norm over dimension 1.
    Channels {
        center: bool,
    },
}

/// Where a tensor's elements lie in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Dimensions from the outermost in memory to the innermost; empty for row-major.
    pub order: Vec<usize>,
    /// Cut out of a larger tensor: dimension, elements before and after. The rest is NaN.
    pub narrow: Option<(usize, usize, usize)>,
    /// Dimension along which one slice is repeated with stride 0.
    pub broadcast: Option<usize>,
}

/// A call.
#[derive(Clone, Debug)]
pub struct Case {
    pub norm: Norm,
    pub dims: Vec<usize>,
    pub dtype: DType,
    pub params: DType,
    pub weight: bool,
    pub bias: bool,
    /// Weight and bias are cut out of longer vectors.
    pub narrow_params: bool,
    /// dtype of the running statistics, where there are any.
    pub running: Option<DType>,
    pub momentum: f64,
    pub eps: f64,
    pub layout: Layout,
    pub fusion: Fusion,
    pub mean: f64,
    pub std: f64,
    pub seed: u64,
}

impl Case {
    /// Contiguous f32 with weight and bias, eps 1e-5, and running statistics where they are needed.
    pub fn new(norm: Norm, dims: &[usize]) -> Self {
        Self {
            norm,
            dims: dims.to_vec(),
            dtype: DType::F32,
            params: DType::F32,
            weight: true,
            bias: !matches!(norm, Norm::Rms { .. } | Norm::Channels { center: false }),
            narrow_params: false,
            running: norm.fixed().then_some(DType::F32),
            momentum: 0.1,
            eps: 1e-5,
            layout: Layout::default(),
            fusion: Fusion::default(),
            mean: 0.0,
            std: 1.0,
            seed: 1,
        }
    }

    pub fn param_dims(&self) -> Vec<usize> {
        match self.norm {
            Norm::Layer { normalized } | Norm::Rms { normalized } => {
                let lead = self.dims.len() - normalized;
                let samples = self.dims[..lead].first().filter(|_| self.fusion.modulated);
                samples.into_iter().chain(&self.dims[lead..]).copied().collect()
            }
            _ => vec![self.dims[1]],
        }
    }

    /// What is added to the weight.
    pub fn offset(&self) -> f64 {
        self.fusion.offset + f64::from(self.fusion.modulated)
    }

    pub fn normalized_shape(&self) -> &[usize] {
        match self.norm {
            Norm::Layer { normalized } | Norm::Rms { normalized } => {
                &self.dims[self.dims.len() - normalized..]
            }
            other => panic!("{other:?} has no normalized_shape"),
        }
    }

    /// Set and parameter of the element with logical index `i`.
    pub fn place(&self, i: usize) -> (usize, usize) {
        let (set, param) = self.norm.place(&self.dims, i);
        let sample = i / self.dims[1..].iter().product::<usize>();
        let own = if self.fusion.modulated {
            sample * self.normalized_shape().iter().product::<usize>()
        } else {
            0
        };
        (set, own + param)
    }

    /// Arguments of the case's seed.
    pub fn random(&self) -> Arguments {
        let mut stored = self.dims.clone();
        if let Some(d) = self.layout.broadcast {
            stored[d] = stored[d].min(1);
        }
        let seed = 8 * self.seed;
        let x = data(seed, stored.iter().product(), self.mean, self.std);
        let x = match self.layout.broadcast {
            Some(d) => repeat(&x, &self.dims, d),
            None => x,
        };
        let params: usize = self.param_dims().iter().product();
        let of = |i: u64, mean, std| data(seed + i, params, mean, std);
        let (channels, n) = (self.dims[1], x.len());
        Arguments {
            dy: data(seed + 1, x.len(), 0.0, 1.0),
            x,
            weight: self.weight.then(|| of(2, 1.0, 0.5)),
            bias: self.bias.then(|| of(3, 0.0, 1.0)),
            running: self.running.map(|_| {
                let mean = data(seed + 4, channels, self.mean, self.std);
                // At most sqrt(12) / 2 standard deviations from the mean: never below 0.1.
                let var = data(seed + 5, channels, self.std * self.std, 0.25 * self.std * self.std);
                (mean, var)
            }),
            residual: self.fusion.residual.map(|_| data(seed + 6, n, 0.5, 1.0)),
            dsum: self.fusion.residual.map(|_| data(seed + 7, n, 0.0, 1.0)),
            skip: self.fusion.skip.then(|| data(seed + 6, n, 0.0, 1.0)),
            gate: self.fusion.gate.map(|_| data(seed + 6, n, 0.0, 2.0)),
        }
    }
}

/// Values of the arguments in logical order.
#[derive(Clone, Debug, Default)]
pub struct Arguments {
    pub x: Vec<f64>,
    pub dy: Vec<f64>,
    pub weight: Option<Vec<f64>>,
    pub bias: Option<Vec<f64>>,
    pub running: Option<(Vec<f64>, Vec<f64>)>,
    pub residual: Option<Vec<f64>>,
    /// Gradient of the sum.
    pub dsum: Option<Vec<f64>>,
    pub skip: Option<Vec<f64>>,
    pub gate: Option<Vec<f64>>,
}

/// The slice `[.., 0, ..]` of dimension `d` repeated to `dims`.
fn repeat(slice: &[f64], dims: &[usize], d: usize) -> Vec<f64> {
    let below: usize = dims[d + 1..].iter().product();
    let count: usize = dims.iter().product();
    (0..count).map(|i| slice[i / (below * dims[d]) * below + i % below]).collect()
}

/// A variable and the view of it that is the argument.
pub struct Argument {
    pub base: Var,
    pub view: Tensor,
    layout: Layout,
}

impl Argument {
    pub fn new(values: &[f64], dims: &[usize], dtype: DType, layout: &Layout) -> Result<Self> {
        // On the host, and moved at the end.
        let cpu = &Device::Cpu;
        let mut view = Tensor::from_slice(values, dims, cpu)?.to_dtype(dtype)?;
        if let Some(d) = layout.broadcast {
            view = view.narrow(d, 0, 1)?;
        }
        if let Some((d, before, after)) = layout.narrow {
            let poison = |n: usize| {
                let mut dims = view.dims().to_vec();
                dims[d] = n;
                Tensor::full(f64::NAN, dims, cpu)?.to_dtype(dtype)
            };
            view = Tensor::cat(&[&poison(before)?, &view, &poison(after)?], d)?;
        }
        if !layout.order.is_empty() {
            view = view.permute(layout.order.clone())?;
        }
        let base = Var::from_tensor(&on_device(&view.contiguous()?)?)?;
        let view = layout.view(base.as_tensor(), dims)?;
        Ok(Self { base, view, layout: layout.clone() })
    }

    /// The gradient that reached the base, seen as the argument was; before a broadcast, if any.
    pub fn gradient(&self, grads: &GradStore) -> Result<Option<Tensor>> {
        let Some(gradient) = grads.get(self.base.as_tensor()) else { return Ok(None) };
        assert_eq!(gradient.dims(), self.base.dims());
        assert_eq!(gradient.dtype(), self.base.dtype());
        let dims = self.view.dims();
        self.layout.before_broadcast(gradient, dims).map(Some)
    }
}

impl Layout {
    fn before_broadcast(&self, base: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let mut view = base.clone();
        if !self.order.is_empty() {
            let mut back = vec![0; self.order.len()];
            self.order.iter().enumerate().for_each(|(to, &from)| back[from] = to);
            view = view.permute(back)?;
        }
        match self.narrow {
            Some((d, before, _)) => {
                let len = if self.broadcast == Some(d) { 1 } else { dims[d] };
                view.narrow(d, before, len)
            }
            None => Ok(view),
        }
    }

    fn view(&self, base: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let view = self.before_broadcast(base, dims)?;
        match self.broadcast {
            Some(_) => view.broadcast_as(dims),
            None => Ok(view),
        }
    }
}

/// Argument tensors of a call, variables all of them.
pub struct Built {
    pub x: Argument,
    pub weight: Option<Argument>,
    pub bias: Option<Argument>,
    pub running: Option<(Var, Var)>,
    pub residual: Option<Argument>,
    pub skip: Option<Argument>,
    pub gate: Option<Argument>,
}

impl Case {
    pub fn build(&self, args: &Arguments) -> Result<Built> {
        let dims = self.param_dims();
        let param = |values: &Option<Vec<f64>>| {
            let narrow = self.narrow_params.then_some((0, 3, 1));
            let layout = Layout { narrow, ..Layout::default() };
            values.as_ref().map(|v| Argument::new(v, &dims, self.params, &layout)).transpose()
        };
        // In the memory order of x, which is where their kernels read them without a copy; else row-major.
        let layout = Layout { order: self.layout.order.clone(), ..Layout::default() };
        let like_x = |values: &Option<Vec<f64>>, dtype: Option<DType>| {
            let dtype = dtype.unwrap_or(self.dtype);
            values.as_ref().map(|v| Argument::new(v, &self.dims, dtype, &layout)).transpose()
        };
        let running = |v: &[f64], dtype| Var::from_tensor(&tensor(v, &[v.len()], dtype)?);
        Ok(Built {
            x: Argument::new(&args.x, &self.dims, self.dtype, &self.layout)?,
            weight: param(&args.weight)?,
            bias: param(&args.bias)?,
            running: match (&args.running, self.running) {
                (Some((mean, var)), Some(dtype)) => Some((running(mean, dtype)?, running(var, dtype)?)),
                _ => None,
            },
            residual: like_x(&args.residual, self.fusion.residual)?,
            skip: like_x(&args.skip, None)?,
            gate: like_x(&args.gate, None)?,
        })
    }

    /// The function under test, where nothing is fused.
    pub fn call(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        running: Option<&(Var, Var)>,
    ) -> Result<Tensor> {
        let (mean, var) = (running.map(|r| &r.0), running.map(|r| &r.1));
        let (momentum, eps) = (self.momentum, self.eps);
        match self.norm {
            Norm::Batch { training } => f::batch_norm(x, mean, var, weight, bias, training, momentum, eps),
            Norm::Instance { use_input_stats } => {
                f::instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, eps)
            }
            Norm::Layer { .. } => f::layer_norm(x, &self.param_dims(), weight, bias, eps),
            Norm::Group { groups } => f::group_norm(x, groups, weight, bias, eps),
            Norm::Rms { .. } => f::rms_norm(x, &self.param_dims(), weight, eps),
            Norm::Channels { center: true } => f::layer_norm_channels(x, weight, bias, eps),
            Norm::Channels { center: false } => f::rms_norm_channels(x, weight, eps),
        }
    }

    pub fn forward(&self, built: &Built) -> Result<Tensor> {
        Ok(self.forward_and_sum(built)?.0)
    }

    /// The output, and the sum of a residual.
    fn forward_and_sum(&self, built: &Built) -> Result<(Tensor, Option<Tensor>)> {
        fn view(a: &Option<Argument>) -> Option<&Tensor> {
            a.as_ref().map(|a| &a.view)
        }
        let x = &built.x.view;
        let (weight, bias, running) = (view(&built.weight), view(&built.bias), built.running.as_ref());
        let (skip, gate, residual) = (view(&built.skip), view(&built.gate), view(&built.residual));
        let (mean, var) = (running.map(|r| &r.0), running.map(|r| &r.1));
        let (momentum, eps, Fusion { offset, .. }) = (self.momentum, self.eps, self.fusion);
        let none = || panic!("no such call: {self:?}");
        if self.fusion == Fusion::default() {
            return Ok((self.call(x, weight, bias, running)?, None));
        }
        if let Some(act) = self.fusion.activation {
            let y = match self.norm {
                Norm::Batch { training } => {
                    fused::batch_norm_act(x, mean, var, weight, bias, training, momentum, eps, skip, act)
                }
                Norm::Instance { use_input_stats: own } => {
                    fused::instance_norm_act(x, mean, var, weight, bias, own, momentum, eps, skip, act)
                }
                Norm::Group { groups } => fused::group_norm_act(x, groups, weight, bias, eps, skip, act),
                Norm::Layer { .. } => {
                    fused::layer_norm_act(x, self.normalized_shape(), weight, bias, eps, skip, act)
                }
                _ => none(),
            };
            return Ok((y?, None));
        }
        let (shape, rms) = (self.normalized_shape(), matches!(self.norm, Norm::Rms { .. }));
        if let Some(residual) = residual {
            let both = match rms {
                true => fused::add_rms_norm(x, residual, shape, weight, offset, eps)?,
                false => fused::add_layer_norm(x, residual, shape, weight, bias, eps)?,
            };
            return Ok((both.normed, Some(both.sum)));
        }
        let y = match (gate, weight, rms) {
            (Some(gate), weight, true) => {
                let after = self.fusion.gate == Some(Gate::After);
                fused::gated_rms_norm(x, gate, shape, weight, eps, after)
            }
            (None, Some(scale), true) if self.fusion.modulated => {
                fused::modulated_rms_norm(x, shape, scale, bias, eps)
            }
            (None, Some(scale), false) if self.fusion.modulated => {
                fused::modulated_layer_norm(x, shape, scale, bias, eps)
            }
            (None, Some(weight), true) => fused::offset_rms_norm(x, shape, weight, offset, eps),
            _ => none(),
        };
        Ok((y?, None))
    }

    /// Runs forward and backward on `args`, rounded to the dtypes.
    pub fn run(&self, args: &Arguments) -> Result<Outcome> {
        let built = self.build(args)?;
        let both = |(mean, var): &(Var, Var)| (values(mean), values(var));
        let before = built.running.as_ref().map(both);
        let (y, sum) = self.forward_and_sum(&built)?;
        let dy = tensor(&args.dy, &self.dims, self.dtype)?;
        let mut loss = (&y * &dy)?.sum_all()?;
        let mut dsum = None;
        if let (Some(sum), Some(values)) = (&sum, &args.dsum) {
            let of_sum = tensor(values, &self.dims, sum.dtype())?;
            loss = (loss + (sum * &of_sum)?.sum_all()?.to_dtype(self.dtype)?)?;
            dsum = Some(of_sum);
        }
        let grads = loss.backward()?;
        let gradient = |a: &Option<Argument>| match a {
            Some(a) => a.gradient(&grads),
            None => Ok(None),
        };
        let seen = |a: &Option<Argument>| a.as_ref().map(|a| values(&a.view));
        let rounded = Arguments {
            x: values(&built.x.view),
            dy: values(&dy),
            weight: seen(&built.weight),
            bias: seen(&built.bias),
            running: before,
            residual: seen(&built.residual),
            dsum: dsum.as_ref().map(values),
            skip: seen(&built.skip),
            gate: seen(&built.gate),
        };
        Ok(Outcome {
            rounded,
            y,
            dx: built.x.gradient(&grads)?,
            dweight: gradient(&built.weight)?,
            dbias: gradient(&built.bias)?,
            running: built.running.as_ref().map(both),
            sum,
            dresidual: gradient(&built.residual)?,
            dskip: gradient(&built.skip)?,
            dgate: gradient(&built.gate)?,
        })
    }
}

/// What came back, and the arguments as their dtypes rounded them.
pub struct Outcome {
    pub rounded: Arguments,
    pub y: Tensor,
    /// Gradients as the arguments were viewed; `dx` before a broadcast, if any.
    pub dx: Option<Tensor>,
    pub dweight: Option<Tensor>,
    pub dbias: Option<Tensor>,
    pub running: Option<(Vec<f64>, Vec<f64>)>,
    pub sum: Option<Tensor>,
    pub dresidual: Option<Tensor>,
    pub dskip: Option<Tensor>,
    pub dgate: Option<Tensor>,
}
