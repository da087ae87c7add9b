//! A layer's whole life: build, train, save, load, evaluate.
//!
//! ```text
//! cargo run --release --example quickstart
//! ```

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
use candle_nn::{linear, AdamW, Linear, Optimizer, VarBuilder, VarMap};
use candle_norm::{batch_norm, layer_norm, BatchNorm, LayerNorm};

struct Net(Linear, BatchNorm, Linear, LayerNorm, Linear);

impl Net {
    fn new(vb: VarBuilder) -> Result<Self> {
        Ok(Self(
            linear(2, 32, vb.pp("fc1"))?,
            batch_norm(32, 1e-5, vb.pp("bn"))?, // candle_nn::batch_norm's signature, or PyTorch's options
            linear(32, 32, vb.pp("fc2"))?,
            layer_norm(32, 1e-5, vb.pp("ln"))?,
            linear(32, 1, vb.pp("fc3"))?,
        ))
    }
}

impl ModuleT for Net {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let x = self.1.forward_t(&self.0.forward(x)?, train)?.relu()?;
        let x = self.3.forward(&self.2.forward(&x)?)?.relu()?;
        self.4.forward(&x)
    }
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let net = Net::new(VarBuilder::from_varmap(&vars, DType::F32, &device))?;
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 1e-2)?;

    // The product of two numbers between -1 and 1.
    let x = Tensor::rand(-1f32, 1., (256, 2), &device)?;
    let y = (x.narrow(1, 0, 1)? * x.narrow(1, 1, 1)?)?;
    for step in 0..=200 {
        let loss = candle_nn::loss::mse(&net.forward_t(&x, true)?, &y)?;
        optimizer.backward_step(&loss)?; // a gradient for every parameter, those before the norms too
        if step % 50 == 0 {
            println!("step {step:3}: loss {:.5}", loss.to_scalar::<f32>()?);
        }
    }

    // The running statistics of batch norm are saved and loaded with the parameters.
    let path = std::env::temp_dir().join("candle-norm-quickstart.safetensors");
    vars.save(&path)?;
    let mut loaded_vars = VarMap::new();
    let loaded = Net::new(VarBuilder::from_varmap(&loaded_vars, DType::F32, &device))?;
    loaded_vars.load(&path)?;
    let (before, after) = (net.forward_t(&x, false)?, loaded.forward_t(&x, false)?);
    println!("evaluation: loss {:.5}", candle_nn::loss::mse(&after, &y)?.to_scalar::<f32>()?);
    println!(
        "largest change by saving and loading: {}",
        (before - after)?.abs()?.max_all()?.to_scalar::<f32>()?
    );
    Ok(())
}
