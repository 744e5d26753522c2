//! Which compiled kernel two runs of elements go to: by their types, and by what the processor has.
//!
//! Macros, since a closure or a function pointer would not be compiled for the processor's instructions.

/// Name the types of two dtypes, neither of which is float64.
macro_rules! by_dtypes {
    ($a:ident, $b:ident, $half:ty, |$A:ident, $B:ident| $call:expr) => {{
        macro_rules! with {
            ($Left:ty, $Right:ty) => {{
                type $A = $Left;
                type $B = $Right;
                $call
            }};
        }
        match ($a.dtype, $b.dtype) {
            (Dtype::BF16, Dtype::BF16) => with!(Bf16, Bf16),
            (Dtype::BF16, Dtype::F16) => with!(Bf16, $half),
            (Dtype::BF16, _) => with!(Bf16, F32),
            (Dtype::F16, Dtype::BF16) => with!($half, Bf16),
            (Dtype::F16, Dtype::F16) => with!($half, $half),
            (Dtype::F16, _) => with!($half, F32),
            (_, Dtype::BF16) => with!(F32, Bf16),
            (_, Dtype::F16) => with!(F32, $half),
            _ => with!(F32, F32),
        }
    }};
}

/// Call a kernel of two types, neither of which is float64, as compiled for what the processor has.
macro_rules! by_processor {
    ($a:ident, $b:ident, |$A:ident, $B:ident| $kernel:ident::<$($type:tt),*>($($argument:expr),*)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            use f16c::F16c;
            if has_f16c() && ($a.dtype == Dtype::F16 || $b.dtype == Dtype::F16) {
                return by_dtypes!($a, $b, F16c, |$A, $B| {
                    // SAFETY: the processor has both instruction sets that the function asks for.
                    #[allow(unsafe_code)]
                    unsafe {
                        f16c::$kernel::<$($type),*>($($argument),*)
                    }
                });
            }
            if std::arch::is_x86_feature_detected!("avx2") {
                return by_dtypes!($a, $b, F16, |$A, $B| {
                    // SAFETY: the processor has AVX2, which the function asks for.
                    #[allow(unsafe_code)]
                    unsafe {
                        avx2::$kernel::<$($type),*>($($argument),*)
                    }
                });
            }
        }
        by_dtypes!($a, $b, F16, |$A, $B| scalar::$kernel::<$($type),*>($($argument),*))
    }};
}

/// Declare the kernels of two types, whose source is `scalar`, as compiled for some instruction sets.
#[cfg(target_arch = "x86_64")]
macro_rules! compiled_for {
    ($features:literal) => {
        #[target_feature(enable = $features)]
        pub(super) fn sums<A: Narrow, B: Narrow, const STORE: bool>(
            a: &[u8],
            b: &[u8],
            difference: &mut [f32],
        ) -> scalar::Sums {
            scalar::sums::<A, B, STORE>(a, b, difference)
        }

        #[target_feature(enable = $features)]
        pub(super) fn odd<A: Narrow, B: Narrow>(a: &[u8], b: &[u8], difference: &mut [f32]) {
            scalar::odd::<A, B>(a, b, difference);
        }

        #[target_feature(enable = $features)]
        pub(super) fn differences<A: Narrow, B: Narrow>(
            a: &[u8],
            b: &[u8],
            difference: &mut [f32],
        ) {
            scalar::differences::<A, B>(a, b, difference);
        }

        #[target_feature(enable = $features)]
        pub(super) fn agreeing<A: Narrow, B: Narrow>(a: &[u8], b: &[u8]) -> u64 {
            scalar::agreeing::<A, B>(a, b)
        }

        #[target_feature(enable = $features)]
        pub(super) fn dot<A: Narrow, B: Narrow>(a: &[u8], b: &[u8]) -> f64 {
            scalar::dot::<A, B>(a, b)
        }
    };
}
