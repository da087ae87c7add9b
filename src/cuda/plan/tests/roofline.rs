//! The launches of every row of `benches/gpu/rows.tsv`, written down for `ci/roofline.py`.

use super::*;
use std::fmt::Write;

/// GPUs by name, as plans see them: the least of a family stands for it.
const DEVICES: [(&str, DeviceProperties); 3] = [
    ("sm_90", SM90),
    ("sm_80", SM80),
    ("sm_89", DeviceProperties { capability: 89, multiprocessors: 128, shared: 99 << 10 }),
];

/// One line of the file.
struct Row {
    name: String,
    norm: String,
    request: Request,
    params: Element,
}

fn row(line: &str) -> Option<Row> {
    let words: Vec<&str> = line.split('\t').collect();
    let [norm, shape, groups, dtype, layout, _] = words[..] else { return None };
    let shape: Vec<usize> =
        shape.split('x').map(|d| d.parse()).collect::<std::result::Result<_, _>>().ok()?;
    let element = if dtype == "bf16" { Element::BF16 } else { Element::F32 };
    let (n, c, space) = (shape[0], shape[1], shape[2..].iter().product::<usize>());
    let geometry = match (norm, layout) {
        ("LayerNorm", _) => rows(n, c),
        ("RmsNorm", _) => Geometry { center: false, ..rows(n, c) },
        ("GroupNorm", "last") => channels_last(n, space, c, c / groups.parse::<usize>().ok()?),
        ("GroupNorm", _) => {
            let groups: usize = groups.parse().ok()?;
            group(n, groups, c / groups, space)
        }
        ("InstanceNorm", _) => group(n, c, 1, space),
        (_, "last") => channels_last(1, n * space, c, 1),
        _ => batch(n, c, space),
    };
    let mut request = request(geometry, element, true);
    request.bias = norm != "RmsNorm";
    let params = if norm.starts_with("Batch") { Element::F32 } else { element };
    Some(Row { name: words[..5].join(" "), norm: norm.into(), request, params })
}

/// As candle-norm calls it: addresses only have to differ from 0, each by a gigabyte.
fn arguments(row: &Row, backward: bool) -> Arguments {
    let given = row.norm == "BatchNormEval";
    let at = |n: u64, there: bool| if there { n << 30 } else { 0 };
    let (bias, batch) = (row.request.bias, row.norm == "BatchNorm");
    Arguments {
        x: at(1, true),
        dy: at(2, backward),
        out: at(3, true),
        weight: at(4, true),
        bias: at(5, bias),
        stats: at(6, backward || !given),
        given_mean: at(7, given),
        given_var: at(8, given),
        running_mean: at(9, batch && !backward),
        running_var: at(10, batch && !backward),
        dweight: at(11, backward),
        dbias: at(12, backward && bias),
        weight_dtype: row.params.code(),
        bias_dtype: row.params.code(),
        dweight_dtype: row.params.code(),
        dbias_dtype: row.params.code(),
        ..Arguments::default()
    }
}

fn plan(row: &Row, device: &DeviceProperties, side: &str) -> Plan {
    let momentum = (row.norm == "BatchNorm").then_some(0.1);
    let given = row.norm == "BatchNormEval";
    let bias = row.request.bias;
    match side {
        "forward" => {
            forward(&row.request, device, &ForwardNeeds { momentum, given, keep: !given, ..FORWARD })
        }
        _ => {
            let as_x = row.params.code() == row.request.element.code();
            backward(&row.request, device, &BackwardNeeds { dbias: bias, as_x, ..BACKWARD })
        }
    }
    .unwrap()
}

/// A line for each row, side and device. Written to the file that `CANDLE_NORM_PLANS` names.
#[test]
fn plans_of_the_rows_on_gpus() {
    let rows: Vec<Row> = include_str!("../../../../benches/gpu/rows.tsv").lines().filter_map(row).collect();
    assert!(rows.len() > 30, "{} rows", rows.len());
    let mut out = String::new();
    for (row, (name, device)) in rows.iter().flat_map(|row| DEVICES.iter().map(move |d| (row, d))) {
        for side in ["forward", "backward"] {
            if side == "backward" && row.norm == "BatchNormEval" {
                continue;
            }
            let plan = plan(row, device, side);
            let params = plan.bind(&arguments(row, side == "backward"), 13 << 30);
            let (elements, bytes) = (row.request.geometry.elements(), row.request.element.bytes());
            assert!(
                !plan.launches.is_empty() && plan.traffic >= 2 * elements * bytes,
                "{}: {plan:?}",
                row.name
            );
            let (traffic, workspace) = (plan.traffic, plan.workspace);
            let _ =
                write!(out, "{}\t{side}\t{name}\t{elements}\t{bytes}\t{traffic}\t{workspace}\t", row.name);
            for l in &plan.launches {
                let _ = write!(out, "{} {} {} {} {},", l.entry.name(), l.grid, l.block, l.shared, l.cluster);
            }
            let _ = writeln!(out, "\t{params:?}");
        }
    }
    if let Some(file) = std::env::var_os("CANDLE_NORM_PLANS") {
        std::fs::write(file, out).unwrap();
    }
}
