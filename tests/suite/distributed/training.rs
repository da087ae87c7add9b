//! A small convolutional network, trained by ranks and by one process side by side.

use super::cases::Group;
use super::support::*;
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{AdamW, Conv2d, Conv2dConfig, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use candle_norm::batch_norm::{batch_norm2d, BatchNormOptions};
use candle_norm::distributed::{all_reduce_gradients, broadcast_vars};
use candle_norm::{batch_norms, convert_sync_batchnorm, BatchNorm, ModuleT};

pub struct Block {
    conv: Conv2d,
    pub bn: BatchNorm,
}
batch_norms!(Block { bn });

pub struct Net {
    pub stem: Block,
    pub blocks: Vec<Block>,
    head: Linear,
}
batch_norms!(Net { stem, blocks });

impl Block {
    fn new(from: usize, to: usize, vb: VarBuilder) -> Result<Self> {
        let config = Conv2dConfig { padding: 1, ..Default::default() };
        let conv = candle_nn::conv2d_no_bias(from, to, 3, config, vb.pp("conv"))?;
        Ok(Self { conv, bn: batch_norm2d(to, BatchNormOptions::default(), vb.pp("bn"))? })
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.bn.forward_t(&self.conv.forward(x)?, train)?.relu()
    }
}

impl Net {
    pub fn new(vb: VarBuilder) -> Result<Self> {
        let stem = Block::new(2, 4, vb.pp("stem"))?;
        let blocks = (0..2).map(|i| Block::new(4, 4, vb.pp("blocks").pp(i))).collect::<Result<Vec<_>>>()?;
        Ok(Self { stem, blocks, head: candle_nn::linear(4, 3, vb.pp("head"))? })
    }

    pub fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = self.stem.forward(x, train)?;
        for block in &self.blocks {
            x = (block.forward(&x, train)? + x)?;
        }
        self.head.forward(&x.mean((2, 3))?)
    }
}

/// Mean squared error over `samples`, as one process with all of them has it.
fn loss(net: &Net, x: &Tensor, target: &Tensor, samples: usize) -> Result<Tensor> {
    (net.forward(x, true)? - target)?.sqr()?.sum_all()? / (3 * samples) as f64
}

pub fn training_follows_one_process(group: &Group) -> Result<()> {
    let (rank, ranks) = (group.rank(), group.world_size());
    let build = |vars: &VarMap| Net::new(VarBuilder::from_varmap(vars, DType::F64, &Device::Cpu));
    let params = ParamsAdamW { lr: 0.02, ..Default::default() };
    let (vars, whole_vars) = (VarMap::new(), VarMap::new());
    let mut net = build(&vars)?;
    assert_eq!(convert_sync_batchnorm(&mut net, group.clone())?, 3);
    // Every rank begins with random numbers of its own; rank 0's are taken.
    broadcast_vars(&vars, group)?;
    let whole = build(&whole_vars)?;
    for (name, var) in vars.data().lock().unwrap().iter() {
        set(&whole_vars, name, var)?;
    }
    let mut optimizer = AdamW::new(vars.all_vars(), params.clone())?;
    let mut whole_optimizer = AdamW::new(whole_vars.all_vars(), params)?;
    // Rank r has r + 1 samples.
    let (start, mine, total) = (rank * (rank + 1) / 2, rank + 1, ranks * (ranks + 1) / 2);
    let mut losses = vec![];
    let (x, target) = (uniform(1000, &[total, 2, 6, 5])?, uniform(2000, &[total, 3])?);
    for _ in 0..10 {
        let part = |t: &Tensor| t.narrow(0, start, mine);
        // The average over ranks of this is the whole batch's loss.
        let local = (loss(&net, &part(&x)?, &part(&target)?, total)? * ranks as f64)?;
        let mut gradients = local.backward()?;
        all_reduce_gradients(&mut gradients, &vars, group)?;
        optimizer.step(&gradients)?;
        let all = loss(&whole, &x, &target, total)?;
        whole_optimizer.step(&all.backward()?)?;
        let summed = group.all_reduce_sum("loss", &local.detach())?;
        near("loss", &(summed / ranks as f64)?, &all, 1e-9)?;
        // AdamW divides by the root of a mean square, so an error of 1e-15 in a gradient near 0 is not
        // one of 1e-15 in the step: three digits for that, three for ten steps.
        let vars = vars.data().lock().unwrap();
        for (name, var) in vars.iter() {
            near(name, var, get(&whole_vars, name)?.as_tensor(), 1e-9)?;
        }
        losses.push(numbers(&all)?[0]);
    }
    let x = uniform(3, &[4, 2, 6, 5])?;
    near("evaluation", &net.forward(&x, false)?, &whole.forward(&x, false)?, 1e-8)?;
    assert!(losses[9] < losses[0], "{losses:?}");
    Ok(())
}
