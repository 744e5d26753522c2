use proptest::prelude::*;

use super::*;
use crate::dtype::{Fp8, e4m3_to_f32, e5m2_to_f32};

const DTYPES: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64];

fn value(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::BF16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        Dtype::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
    }
}

/// The neighbor nearest to `exact` among all values of a 16-bit type, ties to even, by search.
fn nearest_16(dtype: Dtype, exact: f64) -> f64 {
    let at = |bits: u16| value(dtype, &bits.to_le_bytes());
    let infinity = if dtype == Dtype::F16 { 0x7c00 } else { 0x7f80 };
    let magnitude = exact.abs();
    let (mut low, mut high) = (0u16, infinity);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if at(middle) <= magnitude { low = middle } else { high = middle }
    }
    // The first value beyond the range counts as if the exponent went on.
    let ceiling = if high == infinity { at(low) + (at(low) - at(low - 1)) } else { at(high) };
    let (below, above) = (magnitude - at(low), ceiling - magnitude);
    let up = above < below || (above == below && low % 2 == 1);
    at(if up { high } else { low }).copysign(exact)
}

fn rounded(dtype: Dtype, exact: f64) -> f64 {
    match dtype {
        Dtype::BF16 | Dtype::F16 if exact.is_finite() => nearest_16(dtype, exact),
        Dtype::BF16 | Dtype::F16 | Dtype::F64 => exact,
        Dtype::F32 => f64::from(exact as f32),
    }
}

fn check(a: Dtype, b: Dtype, out: Dtype, left: &[u8], right: &[u8]) {
    let numel = (left.len() / a.nbytes()).min(right.len() / b.nbytes());
    let (left, right) = (&left[..numel * a.nbytes()], &right[..numel * b.nbytes()]);
    let mut bytes = vec![0; numel * out.nbytes()];
    let moments = subtract(
        Elements { dtype: a, bytes: left },
        Elements { dtype: b, bytes: right },
        Some((out, &mut bytes)),
    );
    check_plain(a, b, out, (left, right), &bytes, &moments);
    let sides = (Elements { dtype: a, bytes: left }, Elements { dtype: b, bytes: right });
    let dot = dot(sides.0, sides.1);
    let products = products(sides.0, sides.1);
    let mut expected = Moments::default();
    for i in 0..numel {
        let x = value(a, &left[i * a.nbytes()..][..a.nbytes()]);
        let y = value(b, &right[i * b.nbytes()..][..b.nbytes()]);
        let got = value(out, &bytes[i * out.nbytes()..][..out.nbytes()]);
        let want = rounded(out, x - y);
        assert!(
            got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
            "{a:?} {x} - {b:?} {y} as {out:?}: {got} is not {want}"
        );
        expected.nonfinite_reasoning += u64::from(!x.is_finite());
        expected.nonfinite_multimodal += u64::from(!y.is_finite());
        if x.is_finite() && y.is_finite() {
            expected.delta_sq += (x - y) * (x - y);
            expected.reasoning_sq += x * x;
            expected.multimodal_sq += y * y;
            expected.dot += x * y;
            expected.max_abs = expected.max_abs.max((x - y).abs());
            expected.zeros += u64::from(x == y);
            expected.agreeing += u64::from((x > 0.0 && y > 0.0) || (x < 0.0 && y < 0.0));
            expected.overflow += u64::from(!want.is_finite());
        }
    }
    assert_eq!(moments.nonfinite_reasoning, expected.nonfinite_reasoning);
    assert_eq!(moments.nonfinite_multimodal, expected.nonfinite_multimodal);
    assert_eq!(moments.overflow, expected.overflow);
    assert_eq!(moments.zeros, expected.zeros);
    assert_eq!(moments.agreeing, expected.agreeing);
    let largest = (moments.max_abs - expected.max_abs).abs() <= 6e-8 * expected.max_abs;
    assert!(largest || expected.max_abs.is_infinite(), "{}", moments.max_abs);
    let scale = (expected.reasoning_sq * expected.multimodal_sq).sqrt();
    let faults = expected.nonfinite_reasoning + expected.nonfinite_multimodal;
    let beyond = !expected.dot.is_finite() || !scale.is_finite();
    assert!(beyond || faults == 0 || !dot.is_finite(), "{dot} of what is not finite");
    assert!(beyond || faults > 0 || (dot - expected.dot).abs() <= 1e-12 * scale, "{dot}");
    // Sums without moments leave nothing out.
    assert!(faults == 0 || products.iter().all(|sum| sum.is_nan()), "{products:?}");
    let sums = [moments.reasoning_sq, moments.multimodal_sq, moments.dot];
    let [left_sq, right_sq, product] = if faults == 0 { products } else { sums };
    for (got, want, scale) in [
        (left_sq, expected.reasoning_sq, expected.reasoning_sq),
        (right_sq, expected.multimodal_sq, expected.multimodal_sq),
        (product, expected.dot, scale),
        (moments.delta_sq, expected.delta_sq, expected.delta_sq),
        (moments.reasoning_sq, expected.reasoning_sq, expected.reasoning_sq),
        (moments.multimodal_sq, expected.multimodal_sq, expected.multimodal_sq),
        (moments.dot, expected.dot, scale),
    ] {
        // Squares of values near float64's own limit overflow it on either side.
        let beyond = (!got.is_finite() && !want.is_finite()) || scale.is_nan();
        assert!(beyond || (got - want).abs() <= 1e-6 * scale, "{got} is not {want}");
    }
}

/// The difference alone has the same bits, and where its square is finite there was nothing to count.
fn check_plain(
    a: Dtype,
    b: Dtype,
    out: Dtype,
    (left, right): (&[u8], &[u8]),
    expected: &[u8],
    moments: &Moments,
) {
    let mut bytes = vec![0xa5; expected.len()];
    let sides = (Elements { dtype: a, bytes: left }, Elements { dtype: b, bytes: right });
    if !subtract_plainly(sides.0, sides.1, (out, &mut bytes)) {
        assert!(bytes.iter().all(|byte| *byte == 0xa5));
        assert!(out == Dtype::F16 || [a, b, out].contains(&Dtype::F64));
        return;
    }
    assert_eq!(bytes, expected);
    assert_eq!(moments.written_sq.to_bits(), moments.delta_sq.to_bits());
    if square(Elements { dtype: out, bytes: &bytes }).is_finite() {
        let counts = (moments.nonfinite_reasoning, moments.nonfinite_multimodal, moments.overflow);
        assert_eq!(counts, (0, 0, 0));
        assert!((moments.reasoning_sq + moments.multimodal_sq).is_finite());
    }
}

/// Zeros, subnormals, the largest, infinities, NaN, midpoints, and what lies between.
fn special() -> impl Strategy<Value = f64> {
    let edges = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        448.0,
        464.0,
        65504.0,
        65520.0,
        3.3895e38,
        -3.4e38,
        1.00390625,
        f64::from(f32::MIN_POSITIVE),
        f64::from(f32::from_bits(1)),
        6e-8,
        2f64.powi(-133),
        5e-324,
        f64::MAX,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
    ];
    // Blocks of ordinary values must occur as well.
    prop_oneof![40 => -2.0f64..2.0, 1 => proptest::sample::select(edges.to_vec())]
}

fn bytes_of(dtype: Dtype, value: f64) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => half::bf16::from_f64(value).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f64(value).to_le_bytes().to_vec(),
        Dtype::F32 => (value as f32).to_le_bytes().to_vec(),
        Dtype::F64 => value.to_le_bytes().to_vec(),
    }
}

fn pad(offset: usize, values: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    std::iter::repeat_n(0, offset).chain(values.flatten()).collect()
}

/// Both runs, cut to the shorter one's length, and their elements in float64.
fn operands<'a>(
    (a, left): (Dtype, &'a [u8]),
    (b, right): (Dtype, &'a [u8]),
) -> (Vec<(f64, f64)>, Elements<'a>, Elements<'a>) {
    let numel = (left.len() / a.nbytes()).min(right.len() / b.nbytes());
    let (left, right) = (&left[..numel * a.nbytes()], &right[..numel * b.nbytes()]);
    let values = (0..numel)
        .map(|i| {
            let x = value(a, &left[i * a.nbytes()..][..a.nbytes()]);
            (x, value(b, &right[i * b.nbytes()..][..b.nbytes()]))
        })
        .collect();
    (values, Elements { dtype: a, bytes: left }, Elements { dtype: b, bytes: right })
}

fn bf16_at(bytes: &[u8], index: usize) -> f64 {
    value(Dtype::BF16, &bytes[2 * index..2 * index + 2])
}

/// Check the sums over the decoded values, and how many differences were lost.
fn check_stored(moments: &Moments, values: &[(f64, f64)], decoded: &[u8]) {
    let (mut sq, mut dot, mut dot_scale, mut flushed) = (0.0, 0.0, 0.0, 0);
    for (i, (x, y)) in values.iter().enumerate() {
        // Differences beyond float32's range are counted as overflow, not here.
        let (d, s) = (f64::from((x - y) as f32), bf16_at(decoded, i));
        if d.is_finite() && s.is_finite() {
            sq += s * s;
            dot += d * s;
            dot_scale += (d * s).abs();
            // Half of float32's smallest number is rounded to odd, and therefore is not zero.
            flushed += u64::from(x != y && s == 0.0 && (d != 0.0 || moments.flushed > 0));
        }
    }
    assert!((moments.written_sq - sq).abs() <= 1e-12 * sq, "{} {sq}", moments.written_sq);
    assert!((moments.stored_dot - dot).abs() <= 1e-6 * dot_scale, "{} {dot}", moments.stored_dot);
    assert!(moments.flushed <= flushed, "{} {flushed}", moments.flushed);
}

fn check_int8(a: Dtype, b: Dtype, left: &[u8], right: &[u8], first: usize) {
    let (values, left, right) = operands((a, left), (b, right));
    let mut codes = vec![0; values.len()];
    let mut scales = vec![0; 2 * values.len().div_ceil(INT8_BLOCK)];
    let moments = subtract_int8(left, right, &mut codes, &mut scales);
    let mut overflow = 0;
    for (number, block) in values.chunks(INT8_BLOCK).enumerate() {
        let differences: Vec<f32> = block.iter().map(|(x, y)| (x - y) as f32).collect();
        let finite = || differences.iter().filter(|d| d.is_finite());
        let most = finite().fold(0f32, |most, d| most.max(d.abs()));
        let stored = u16::from_le_bytes([scales[2 * number], scales[2 * number + 1]]);
        let scale = half::f16::from_bits(stored).to_f64();
        let least = f64::from(most) / 127.0;
        assert!(scale >= least || stored == 0x7bff, "{scale} {least}");
        let below = stored.checked_sub(1).map(|bits| half::f16::from_bits(bits).to_f64());
        assert!(below.is_none_or(|below| below < least), "{scale} is not the least for {least}");
        for (i, &d) in differences.iter().enumerate() {
            let code = f64::from(codes[INT8_BLOCK * number + i] as i8);
            let ratio = if scale > 0.0 && d.is_finite() { d / scale as f32 } else { 0.0 };
            assert_eq!(code, f64::from(ratio.clamp(-127.0, 127.0)).round_ties_even(), "{d}");
            let (x, y) = block[i];
            let beyond = f64::from(d).abs() > 127.5 * 65504.0;
            overflow += u64::from(x.is_finite() && y.is_finite() && beyond);
        }
    }
    assert_eq!(moments.overflow, overflow);
    let decode = |from: usize| {
        let mut out = vec![0; 2 * (codes.len() - from)];
        let held = &scales[from / INT8_BLOCK * 2..];
        decode_int8(&codes[from..], held, from % INT8_BLOCK, &mut out);
        out
    };
    let decoded = decode(0);
    for (i, &code) in codes.iter().enumerate() {
        let at = i / INT8_BLOCK * 2;
        let scale = half::f16::from_le_bytes([scales[at], scales[at + 1]]).to_f64();
        assert_eq!(bf16_at(&decoded, i), rounded(Dtype::BF16, f64::from(code as i8) * scale));
    }
    let from = first % codes.len().max(1);
    if from < codes.len() {
        assert_eq!(decode(from), decoded[2 * from..]);
    }
    check_stored(&moments, &values, &decoded);
}

/// The same cases on every machine, so that everybody sees the same failures.
fn fixed(cases: u32) -> ProptestConfig {
    let rng_seed = proptest::test_runner::RngSeed::Fixed(2510);
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(fixed(3000))]

    #[test]
    fn any_bits_of_any_dtypes_subtract_as_float64_rounded_once(
        left in proptest::collection::vec(any::<u8>(), 0..600),
        right in proptest::collection::vec(any::<u8>(), 0..600),
        a in 0..4usize, b in 0..4usize, out in 0..4usize,
    ) {
        check(DTYPES[a], DTYPES[b], DTYPES[out], &left, &right);
    }

    #[test]
    fn weights_of_ordinary_size_sum_within_a_millionth(
        values in proptest::collection::vec(-0.1f32..0.1, 2 * BLOCK + 77), a in 0..3usize, b in 0..3usize,
    ) {
        let encode = |dtype: Dtype, shift: f32| -> Vec<u8> {
            values.iter().flat_map(|v| match dtype {
                Dtype::BF16 => half::bf16::from_f32(v + shift).to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f32(v + shift).to_le_bytes().to_vec(),
                _ => (v + shift).to_le_bytes().to_vec(),
            }).collect()
        };
        check(DTYPES[a], DTYPES[b], Dtype::BF16, &encode(DTYPES[a], 0.01), &encode(DTYPES[b], 0.0));
    }
}

proptest! {
    #![proptest_config(fixed(600))]

    #[test]
    fn special_values_at_any_offset_subtract_as_float64_rounded_once(
        pairs in proptest::collection::vec((special(), special()), 0..2 * BLOCK + 40),
        a in 0..4usize, b in 0..4usize, out in 0..4usize, offset in 0..7usize,
    ) {
        let (a, b) = (DTYPES[a], DTYPES[b]);
        let left: Vec<u8> = pad(offset, pairs.iter().map(|(value, _)| bytes_of(a, *value)));
        let right: Vec<u8> = pad(offset + 1, pairs.iter().map(|(_, value)| bytes_of(b, *value)));
        check(a, b, DTYPES[out], &left[offset..], &right[offset + 1..]);
    }

    #[test]
    fn int8_codes_and_scales_are_those_of_the_definition(
        left in proptest::collection::vec(any::<u8>(), 0..2500),
        right in proptest::collection::vec(any::<u8>(), 0..2500),
        a in 0..4usize, b in 0..4usize, first in 0..5000usize,
    ) {
        check_int8(DTYPES[a], DTYPES[b], &left, &right, first);
    }

    #[test]
    fn int8_codes_of_ordinary_differences_are_those_of_the_definition(
        pairs in proptest::collection::vec((special(), -0.01f64..0.01), 0..BLOCK + 300),
        a in 0..4usize, first in 0..5000usize,
    ) {
        let a = DTYPES[a];
        let left: Vec<u8> = pairs.iter().flat_map(|(_, value)| bytes_of(a, *value)).collect();
        let right: Vec<u8> = pairs.iter().flat_map(|_| [0, 0]).collect();
        check_int8(a, Dtype::BF16, &left, &right, first);
    }

    #[test]
    fn block_scaled_codes_are_dequantized_at_any_length(
        codes in proptest::collection::vec(any::<u8>(), 0..700), scale in 1e-30f32..1e30,
    ) {
        for format in [Fp8::E4M3, Fp8::E5M2] {
            let mut out = vec![0; 4 * codes.len()];
            dequantize(format, &codes, scale, &mut out);
            for (&code, out) in codes.iter().zip(out.as_chunks::<4>().0) {
                let value = match format {
                    Fp8::E4M3 => e4m3_to_f32(code),
                    Fp8::E5M2 => e5m2_to_f32(code),
                };
                // The exact product has at most 28 bits, so float64 rounds nothing.
                let (got, want) =
                    (f32::from_le_bytes(*out), (f64::from(value) * f64::from(scale)) as f32);
                prop_assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn avx2_gives_the_bits_of_the_scalar_reference() {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    // Exponents short of all ones: which NaN an addition returns is not specified.
    let bytes: Vec<u8> =
        (0..4 * BLOCK as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 & 0xbb).collect();
    for numel in [0, 1, 15, 16, 17, 1000, BLOCK] {
        let (a, b) = (&bytes[1..1 + 2 * numel], &bytes[3..3 + 2 * numel]);
        let (mut left, mut right) = (vec![0f32; numel], vec![0f32; numel]);
        let reference = scalar::sums::<Bf16, F16, true>(a, b, &mut left).folded;
        // SAFETY: AVX2 was detected above.
        #[allow(unsafe_code)]
        let dispatched = unsafe { avx2::sums::<Bf16, F16, true>(a, b, &mut right) }.folded;
        assert_eq!(
            left.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
            right.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        );
        assert_eq!(reference.delta_sq.to_bits(), dispatched.delta_sq.to_bits());
        assert_eq!(reference.dot.to_bits(), dispatched.dot.to_bits());
    }
}

#[test]
fn squares_beyond_float32_are_summed_in_float64() {
    let encode = |v: f32| half::bf16::from_f32(v).to_le_bytes().repeat(100);
    for magnitude in [1e30f32, 1e-30] {
        let (a, b) = (encode(magnitude), encode(-magnitude));
        check(Dtype::BF16, Dtype::BF16, Dtype::BF16, &a, &b);
    }
}

#[test]
fn a_difference_that_leaves_half_precision_is_counted() {
    let a = 60000f32.to_le_bytes().repeat(5);
    let b = (-60000f32).to_le_bytes().repeat(5);
    let mut out = [0; 10];
    let moments = subtract(
        Elements { dtype: Dtype::F32, bytes: &a },
        Elements { dtype: Dtype::F32, bytes: &b },
        Some((Dtype::F16, &mut out)),
    );
    assert_eq!(moments.overflow, 5);
}

proptest! {
    #[test]
    fn a_square_has_the_bits_of_the_sum_that_a_subtraction_takes(
        values in prop::collection::vec(any::<u8>(), 0..3 * 8 * BLOCK),
        scale in prop_oneof![Just(0u8), Just(0x0f), Just(0xff)],
    ) {
        // Ordinary values, subnormal ones and zeros, and what is not finite.
        let bytes: Vec<u8> = values.iter().map(|byte| byte & scale).collect();
        for dtype in DTYPES {
            let whole = bytes.len() / dtype.nbytes() * dtype.nbytes();
            let elements = Elements { dtype, bytes: &bytes[..whole] };
            let moments = subtract(elements, elements, None);
            let found = square(elements);
            if moments.nonfinite_reasoning > 0 {
                prop_assert!(found.is_nan());
            } else {
                prop_assert_eq!(found.to_bits(), moments.reasoning_sq.to_bits());
            }
        }
    }
}
