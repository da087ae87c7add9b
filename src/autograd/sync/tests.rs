//! The merge against statistics of the whole, on the host and in candle's ops.

use super::*;

/// Rank messages of `values`, and the statistics of all values together, in f64.
fn messages(ranks: &[&[f64]]) -> Vec<f64> {
    ranks
        .iter()
        .flat_map(|values| {
            let (mean, var) = moments(values);
            [0.0, values.len() as f64, mean, 0.0, var]
        })
        .collect()
}

/// Mean and biased variance; zeros of nothing.
fn moments(values: &[f64]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    (mean, values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n)
}

fn merge_both(messages: &Tensor, channels: usize) -> Result<[(Vec<f64>, f64); 2]> {
    let numbers = |(stats, count): (Tensor, Tensor)| -> Result<(Vec<f64>, f64)> {
        let wide = |t: Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        Ok((wide(stats)?, wide(count)?[0]))
    };
    Ok([numbers(merge_on_host(messages, channels)?)?, numbers(merge_on_device(messages, channels)?)?])
}

#[test]
fn merge_equals_statistics_of_the_whole() -> Result<()> {
    let cases: [&[&[f64]]; 5] = [
        &[&[1.0, 2.0, 4.0]],
        &[&[1.0, 2.0], &[4.0, 8.0]],
        &[&[1.0], &[1e3, 1e3 + 1.0, 1e3 + 5.0], &[-7.0, 3.0]],
        // Ranks without samples, first and in between.
        &[&[], &[3.0, 5.0], &[], &[-1.0]],
        &[&[], &[]],
    ];
    for ranks in cases {
        let all: Vec<f64> = ranks.concat();
        let (mean, var) = moments(&all);
        let message = Tensor::from_vec(messages(ranks), (ranks.len(), 5), &Device::Cpu)?;
        for (stats, count) in merge_both(&message, 1)? {
            assert_eq!(count, all.len() as f64);
            // f64 rounding of a handful of operations on values up to 1e3.
            assert!((stats[0] + stats[1] - mean).abs() < 1e-12, "{stats:?} against {mean}");
            assert!((stats[2] - var).abs() <= 1e-12 * var.max(1.0), "{stats:?} against {var}");
        }
    }
    Ok(())
}

/// In f32 a rounded mean of 1e4 is off by up to 5e-4; the second part carries the rest.
#[test]
fn merged_f32_mean_keeps_its_low_part() -> Result<()> {
    let (a, b) = (10000.001f64, 10000.003f64);
    let split = |mean: f64| (mean as f32, (mean - mean as f32 as f64) as f32);
    let rank = |mean| {
        let (high, low) = split(mean);
        [0f32, 7.0, high, low, 1.0]
    };
    let message = Tensor::new(&[rank(a), rank(b)], &Device::Cpu)?;
    for (stats, _) in merge_both(&message, 1)? {
        assert!((stats[0] + stats[1] - 10000.002).abs() < 1e-9, "{stats:?}");
        assert_eq!(stats[0], split(10000.002).0 as f64);
    }
    Ok(())
}

/// 2^24 + 1 is no f32; in two parts it is exact and weighs as it should. The sum is a divisor, rounded.
#[test]
fn merge_counts_beyond_f32_integers() -> Result<()> {
    let message = Tensor::new(&[[1f32, 1., 0., 0., 0.], [1., 1., 1., 0., 0.]], &Device::Cpu)?;
    for (stats, count) in merge_both(&message, 1)? {
        let exact = 2.0 * (COUNT_BASE as f64 + 1.0);
        assert!((count / exact - 1.0).abs() <= f32::EPSILON as f64 / 2.0);
        assert_eq!(stats, [0.5, 0.0, 0.25]);
    }
    Ok(())
}
