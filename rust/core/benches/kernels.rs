//! Bytes a second of every kernel, for pairs that fit in a core's second-level cache and for pairs
//! that do not fit in any.
//!
//! `cargo bench -p drift-fast-core` runs all; a part of a name selects, such as `-- subtract/BF16`.
//! The figure counts what is read from both sides. Before it is timed, each kernel's norm of Δ is
//! compared with one summed in float64 from the same bytes.

#![allow(clippy::panic, missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use drift_fast_core::Dtype;
use drift_fast_core::dtype::Fp8;
use drift_fast_core::kernel::{
    Elements, INT8_BLOCK, decode_int8, dequantize, dot, subtract, subtract_int8,
};

/// Elements of a side: with an output, half a mebibyte in bfloat16; and 128 MiB.
const SIZES: [(&str, usize); 2] = [("cached", 1 << 16), ("memory", 1 << 26)];
const NARROW: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// Weights of about a hundredth, the same ones every time.
fn weights(dtype: Dtype, numel: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(numel * dtype.nbytes());
    for _ in 0..numel {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = (state >> 40) as f32 / (1u32 << 24) as f32 * 0.04 - 0.02;
        match dtype {
            Dtype::BF16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
            Dtype::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
            Dtype::F32 => bytes.extend(value.to_le_bytes()),
            Dtype::F64 => bytes.extend(f64::from(value).to_le_bytes()),
        }
    }
    bytes
}

fn check(name: &str, found: f64, a: Elements<'_>, b: Elements<'_>) {
    let mut difference = vec![0; a.numel() * 8];
    subtract(a, b, Some((Dtype::F64, &mut difference)));
    let difference = Elements { dtype: Dtype::F64, bytes: &difference };
    let exact = dot(difference, difference);
    assert!((found - exact).abs() <= 1e-6 * exact, "{name}: ‖Δ‖² is {found}, expected {exact}");
}

fn subtraction(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("subtract");
    for (place, numel) in SIZES {
        for (a, b) in NARROW.iter().flat_map(|a| NARROW.map(|b| (*a, b))) {
            let (left, right) = (weights(a, numel, 1), weights(b, numel, 2));
            let (x, y) =
                (Elements { dtype: a, bytes: &left }, Elements { dtype: b, bytes: &right });
            group.throughput(Throughput::Bytes((left.len() + right.len()) as u64));
            for out in [None, Some(Dtype::BF16), Some(Dtype::F16), Some(Dtype::F32)] {
                let mut bytes = vec![0; out.map_or(0, |out| numel * out.nbytes())];
                let written = out.map_or("statistics", Dtype::name);
                let name = format!("{}-{}={written}/{place}", a.name(), b.name());
                let mut once = || subtract(x, y, out.map(|out| (out, &mut bytes[..])));
                check(&name, once().delta_sq, x, y);
                group.bench_function(&name, |bencher| bencher.iter(|| black_box(once())));
            }
        }
    }
    // The exact kernel is the same for every mix.
    let (_, numel) = SIZES[0];
    let (left, right) = (weights(Dtype::F64, numel, 1), weights(Dtype::F64, numel, 2));
    let (x, y) = (
        Elements { dtype: Dtype::F64, bytes: &left },
        Elements { dtype: Dtype::F64, bytes: &right },
    );
    group.throughput(Throughput::Bytes((left.len() + right.len()) as u64));
    group.bench_function("F64-F64=statistics/cached", |bencher| {
        bencher.iter(|| black_box(subtract(x, y, None)));
    });
    group.finish();
}

fn compression(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("compress");
    for (place, numel) in SIZES {
        let (left, right) = (weights(Dtype::BF16, numel, 1), weights(Dtype::BF16, numel, 2));
        let (x, y) = (
            Elements { dtype: Dtype::BF16, bytes: &left },
            Elements { dtype: Dtype::BF16, bytes: &right },
        );
        let mut codes = vec![0; numel];
        let mut scales = vec![0; 2 * numel.div_ceil(INT8_BLOCK)];
        let mut out = vec![0; 2 * numel];
        group.throughput(Throughput::Bytes((left.len() + right.len()) as u64));
        let mut int8 = || subtract_int8(x, y, &mut codes, &mut scales);
        check("int8", int8().delta_sq, x, y);
        group.bench_function(format!("BF16-BF16=int8/{place}"), |bencher| {
            bencher.iter(|| black_box(int8()));
        });
        group.throughput(Throughput::Bytes(numel as u64));
        group.bench_function(format!("decode int8/{place}"), |bencher| {
            bencher.iter(|| decode_int8(&codes, &scales, 0, black_box(&mut out)));
        });
    }
    group.finish();
}

/// Runs of 128 codes under a scale each, as a block-scaled weight is read.
fn dequantization(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dequantize");
    for (place, numel) in SIZES {
        let codes: Vec<u8> = (0..numel).map(|i| (i.wrapping_mul(97) % 120) as u8).collect();
        let mut values = vec![0; 4 * numel];
        group.throughput(Throughput::Bytes(numel as u64));
        for (name, format) in [("E4M3", Fp8::E4M3), ("E5M2", Fp8::E5M2)] {
            group.bench_function(format!("{name}/{place}"), |bencher| {
                bencher.iter(|| {
                    for (codes, values) in codes.chunks(128).zip(values.chunks_mut(512)) {
                        dequantize(format, codes, black_box(0.01), values);
                    }
                });
            });
        }
    }
    group.finish();
}

fn brief() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! {
    name = kernels;
    config = brief();
    targets = subtraction, compression, dequantization
}
criterion_main!(kernels);
