//! What the launches of the GPU benchmark's rows move, counted access by access, and their plans.
//!
//!     CANDLE_NORM_LEDGER=plans.json cargo test --features cuda-emulation --lib ledger
//!
//! Kept apart from `Emulated` because nothing is computed here: memory stays untouched zeros, and of each
//! grid a few clusters run, evenly spread, whose counts stand for the rest. So rows of gigabytes are
//! counted in a second. `ci/traffic.py` holds them against a table, and the round on a GPU launches
//! variants of the kernels by the plans. Bytes are counted in a build with `CANDLE_NORM_RACE=1`.

use super::{find, norm_emulation_launch, norm_emulation_sample, watch, Emulated};
use crate::cuda::entry::Kernel::*;
use crate::cuda::machine::{Machine, RunningAddresses};
use crate::cuda::params::Params;
use crate::cuda::plan::{DeviceProperties, Launch};
use crate::cuda::{run_backward, run_forward};
use crate::geometry::{self, Channels, Geometry};
use crate::request::{accumulation_dtype, Arg, Backward, Forward, Given, Norm, Running, Want};
use candle_core::{bail, DType, Result};
use rayon::prelude::*;
use serde_json::{json, Value};
use std::cell::RefCell;

/// The argument as numbers of 8 bytes.
const WORDS: usize = size_of::<Params>() / 8;

/// Of the clusters of a grid, how many run, and after how many neighbours the grid repeats itself: the last
/// chunk of a set, and the last tile of a row, have less to do than the others.
fn sample(launch: &Launch, params: &Params) -> (u32, u32) {
    let (clusters, chunks) = (u64::from(launch.grid / launch.cluster), params.schedule.chunks);
    let (least, period) = match launch.entry.kernel() {
        SplitMoments | SplitForward | SplitSums | SplitBackward => (6, chunks),
        ColumnMoments | ColumnForward | ColumnSums | ColumnBackward => {
            (6, clusters / (chunks * params.shape.outer))
        }
        // Each has many rows, one as many as the next.
        BackwardRows | BackwardRowsCluster | BackwardPlain | BackwardPlainWide | BackwardPlainCluster
        | GatedBackward => (2, 1),
        SplitColumnSums => (2, params.schedule.part_width),
        // The first blocks may have a turn more than the others.
        ForwardSeveral => (48, 1),
        _ => (6, 1),
    };
    // Of many neighbours the last one counts for little.
    let period = if period > 24 || period > clusters { 1 } else { period as u32 };
    (clusters.min(u64::from(u32::next_multiple_of(least, period))) as u32, period)
}

/// Memory of zeros that is never touched but where a sampled block does.
struct Buffer {
    dtype: DType,
    len: usize,
    memory: *mut u8,
}

impl Buffer {
    fn new(dtype: DType, len: usize) -> Self {
        // SAFETY: a layout of at least one byte; zeroed pages of the system, or null, which is checked.
        let memory = unsafe { std::alloc::alloc_zeroed(Self::layout(dtype, len)) };
        assert!(!memory.is_null(), "no memory for {len} elements of {dtype:?}");
        Self { dtype, len, memory }
    }

    /// Aligned as the plan asks and no more: zeros of a greater alignment are written one by one.
    fn layout(dtype: DType, len: usize) -> std::alloc::Layout {
        let bytes = (len * dtype.size_in_bytes()).max(1);
        std::alloc::Layout::from_size_align(bytes, 16).expect("a size below 2^63")
    }

    fn bytes(&self) -> usize {
        self.len * self.dtype.size_in_bytes()
    }

    fn address(&self) -> u64 {
        self.memory.expose_provenance() as u64
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` by the same layout.
        unsafe { std::alloc::dealloc(self.memory, Self::layout(self.dtype, self.len)) }
    }
}

/// A machine that writes down what it is asked to launch.
struct Ledger {
    emulated: Emulated,
    /// Address and bytes of every buffer, by the order in which they came.
    buffers: RefCell<Vec<(u64, usize)>>,
    launches: RefCell<Vec<Value>>,
}

impl Ledger {
    fn new(capability: u32) -> Result<Self> {
        let emulated = Emulated::new(capability)?;
        Ok(Self { emulated, buffers: RefCell::default(), launches: RefCell::default() })
    }

    fn remember(&self, buffer: &Buffer) -> u64 {
        let entry = (buffer.address(), buffer.bytes());
        let mut buffers = self.buffers.borrow_mut();
        if !buffers.contains(&entry) {
            buffers.push(entry);
        }
        entry.0
    }

    /// The argument as words, and which of them are addresses: word, buffer, bytes into it.
    fn words(&self, params: &Params) -> (Vec<u64>, Vec<(usize, usize, u64)>) {
        // SAFETY: `Params` is `repr(C)` without padding that the words would cover: it consists of numbers
        // alone, and a test holds that its fields follow each other without a gap.
        let words = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast::<u64>(), WORDS) };
        let buffers = self.buffers.borrow();
        let place = |word: u64| {
            let within = |&(at, bytes): &(u64, usize)| word >= at && word < at + bytes.max(1) as u64;
            buffers.iter().position(within).map(|buffer| (buffer, word - buffers[buffer].0))
        };
        let addresses = words.iter().enumerate().filter_map(|(i, &word)| {
            let (buffer, offset) = place(word)?;
            Some((i, buffer, offset))
        });
        (words.to_vec(), addresses.collect())
    }
}

impl Machine for Ledger {
    type Storage = Buffer;

    fn properties(&self) -> &DeviceProperties {
        self.emulated.properties()
    }

    fn allocate(&self, dtype: DType, len: usize) -> Result<Buffer> {
        Ok(Buffer::new(dtype, len))
    }

    fn dtype(&self, storage: &Buffer) -> DType {
        storage.dtype
    }

    fn address(&self, arg: &Arg<Buffer>) -> Result<u64> {
        Ok(self.remember(arg.storage) + (arg.offset * arg.storage.dtype.size_in_bytes()) as u64)
    }

    fn address_mut(&self, storage: &mut Buffer) -> Result<u64> {
        Ok(self.remember(storage))
    }

    fn with_running(
        &self,
        _: Option<&Running>,
        run: &mut dyn FnMut(Option<RunningAddresses>) -> Result<()>,
    ) -> Result<()> {
        run(None)
    }

    fn launch(&self, launch: &Launch, params: &Params, _follows: bool) -> Result<()> {
        let kernel = find(launch.entry.name())?;
        self.emulated.check(launch, kernel)?;
        watch::over();
        self.buffers.borrow().iter().for_each(|&(at, bytes)| watch::counts(at, bytes));
        let (run, period) = sample(launch, params);
        // SAFETY: as in `Emulated::launch`; of the grid some clusters run.
        let fault = unsafe {
            norm_emulation_sample(run, period);
            let shared = launch.shared as usize;
            let fault = norm_emulation_launch(
                kernel,
                launch.grid,
                launch.block,
                shared,
                std::ptr::from_ref(params).cast(),
            );
            norm_emulation_sample(0, 1);
            fault
        };
        if !fault.is_null() {
            bail!("{}: a fault", launch.entry.name())
        }
        let scale = f64::from(launch.grid / launch.cluster) / f64::from(run);
        let scaled = |bytes: u64| (bytes as f64 * scale).round() as u64;
        let moved: Vec<_> = self.buffers.borrow().iter().map(|&(at, _)| watch::traffic(at)).collect();
        let (words, addresses) = self.words(params);
        self.launches.borrow_mut().push(json!({
            "kernel": launch.entry.name(),
            "module": launch.entry.module().stem(),
            "grid": launch.grid,
            "block": launch.block,
            "shared": launch.shared,
            "cluster": launch.cluster,
            "moved": moved.iter().map(|&(read, written)| [scaled(read), scaled(written)]).collect::<Vec<_>>(),
            "argument": words.iter().map(|word| format!("{word:016x}")).collect::<Vec<_>>(),
            "addresses": addresses,
        }));
        Ok(())
    }
}

/// A row of `benches/gpu/rows.tsv`.
struct Row {
    name: String,
    geometry: Geometry,
    dtype: DType,
    param_dtype: DType,
    bias: bool,
    eval: bool,
}

impl Row {
    fn new(line: &str) -> Option<Self> {
        let [norm, shape, groups, dtype, layout, ..] = line.split('\t').collect::<Vec<_>>()[..] else {
            return None;
        };
        let shape: Vec<usize> = shape.split('x').map(|d| d.parse().ok()).collect::<Option<_>>()?;
        let stride = |order: &[usize]| {
            let mut stride = vec![0; shape.len()];
            let mut next = 1;
            for &d in order.iter().rev() {
                stride[d] = next;
                next *= shape[d];
            }
            stride
        };
        let stride = match layout {
            "last" => stride(&[0, 2, 3, 1]),
            _ => stride(&(0..shape.len()).collect::<Vec<_>>()),
        };
        let channels = |sets| geometry::channels(&shape, &stride, sets);
        let placed = match norm {
            "LayerNorm" => geometry::layer(&shape, &stride, 1, true),
            "RmsNorm" => geometry::layer(&shape, &stride, 1, false),
            "GroupNorm" => channels(Channels::Groups(groups.parse().ok()?)),
            "InstanceNorm" => channels(Channels::Groups(shape[1])),
            _ => channels(Channels::Batch),
        };
        let dtype = if dtype == "bf16" { DType::BF16 } else { DType::F32 };
        let batch = norm.starts_with("BatchNorm");
        Some(Self {
            name: line.split('\t').take(5).collect::<Vec<_>>().join("\t"),
            geometry: placed?.geometry,
            dtype,
            param_dtype: if batch { DType::F32 } else { dtype },
            bias: norm != "RmsNorm",
            eval: norm == "BatchNormEval",
        })
    }

    /// Launches of the forward as inference calls it, and of the backward with all gradients.
    fn plans(&self, capability: u32) -> Result<Vec<Value>> {
        let g = self.geometry;
        let norm = Norm::new("row", g, 1e-5);
        let tensor = || Buffer::new(self.dtype, g.elements());
        let param = || Buffer::new(self.param_dtype, g.params());
        let (x, weight, bias) = (tensor(), param(), param());
        let arg = |storage| Arg { storage, offset: 0 };
        let side = |name: &str, ledger: Ledger| {
            let buffers = ledger.buffers.into_inner();
            json!({
                "row": self.name,
                "side": name,
                "capability": capability,
                "elements": g.elements(),
                "element_bytes": self.dtype.size_in_bytes(),
                "buffers": buffers.iter().map(|&(_, bytes)| bytes).collect::<Vec<_>>(),
                "launches": ledger.launches.into_inner(),
            })
        };
        let mut all = vec![];
        let ledger = Ledger::new(capability)?;
        let running = Buffer::new(DType::F32, g.sets());
        let given = || Given { mean: arg(&running), mean_low: None, var: arg(&running) };
        let forward = Forward {
            weight: Some(arg(&weight)),
            bias: self.bias.then(|| arg(&bias)),
            given: self.eval.then(given),
            ..Forward::new(norm, arg(&x))
        };
        drop(run_forward(&ledger, forward)?);
        all.push(side("forward", ledger));
        if !self.eval {
            let ledger = Ledger::new(capability)?;
            let (dy, stats) = (tensor(), Buffer::new(accumulation_dtype(self.dtype), 3 * g.sets()));
            let gradient = Some(self.param_dtype);
            let want = Want {
                dx: true,
                dweight: gradient,
                dbias: gradient.filter(|_| self.bias),
                ..Want::default()
            };
            let backward = Backward {
                weight: Some(arg(&weight)),
                want,
                ..Backward::new(norm, arg(&x), arg(&dy), arg(&stats))
            };
            drop(run_backward(&ledger, backward)?);
            all.push(side("backward", ledger));
        }
        Ok(all)
    }
}

#[test]
fn ledger() -> anyhow::Result<()> {
    let rows = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/gpu/rows.tsv"))?;
    let rows: Vec<_> = rows.lines().filter(|line| !line.starts_with('#')).filter_map(Row::new).collect();
    assert!(rows.len() > 20, "rows.tsv has {} rows", rows.len());
    let out = std::env::var_os("CANDLE_NORM_LEDGER");
    // The small rows in every test run, all of them where somebody reads the result.
    let wanted = |row: &&Row| out.is_some() || row.geometry.elements() < 1 << 16;
    let of = |row: &Row| Ok([row.plans(90)?, row.plans(80)?].concat());
    let wanted: Vec<_> = rows.iter().filter(wanted).collect();
    let plans: Result<Vec<Vec<_>>> = wanted.into_par_iter().map(of).collect();
    let plans = plans?.concat();
    for plan in &plans {
        assert!(plan["launches"].as_array().is_some_and(|launches| !launches.is_empty()), "{plan}");
    }
    if let Some(out) = out {
        std::fs::write(out, serde_json::to_string(&plans)?)?;
    }
    Ok(())
}
