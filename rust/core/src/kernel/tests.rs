use proptest::prelude::*;

use super::*;

const DTYPES: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64];

fn value(dtype: Dtype, bytes: &[u8]) -> f64 {
    match dtype {
        Dtype::BF16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        Dtype::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f64(),
        Dtype::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
    }
}

/// The neighbour nearest to `exact` among all values of a 16-bit type, ties to even, by search.
fn nearest_16(dtype: Dtype, exact: f64) -> f64 {
    let at = |bits: u16| value(dtype, &bits.to_le_bytes());
    let infinity = if dtype == Dtype::F16 { 0x7c00 } else { 0x7f80 };
    let magnitude = exact.abs();
    let (mut low, mut high) = (0u16, infinity);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if at(middle) <= magnitude { low = middle } else { high = middle }
    }
    // The first value past the range counts as if the exponent went on.
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
            expected.overflow += u64::from(!want.is_finite());
        }
    }
    assert_eq!(moments.nonfinite_reasoning, expected.nonfinite_reasoning);
    assert_eq!(moments.nonfinite_multimodal, expected.nonfinite_multimodal);
    assert_eq!(moments.overflow, expected.overflow);
    let scale = (expected.reasoning_sq * expected.multimodal_sq).sqrt();
    for (got, want, scale) in [
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

/// The same cases on every machine, so that a failure is one for everybody.
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
        let reference = scalar::sums::<Bf16, F16>(a, b, &mut left).folded;
        // SAFETY: AVX2 was detected above.
        #[allow(unsafe_code)]
        let dispatched = unsafe { avx2::sums::<Bf16, F16>(a, b, &mut right) }.folded;
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
