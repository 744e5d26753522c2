//! The floating-point environment in which every kernel runs.
//!
//! A thread inherits its creator's control register, which flushes subnormals to zero after
//! `torch.set_flush_denormal(True)`. Kernels therefore set the IEEE 754 default and restore the
//! former state afterwards.

/// Holds the default environment until dropped.
pub(super) struct DefaultFloat {
    #[cfg(target_arch = "x86_64")]
    saved: u32,
    #[cfg(target_arch = "aarch64")]
    saved: u64,
}

impl DefaultFloat {
    pub(super) fn enter() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let saved = x86_64::read();
            // All exceptions masked, round to nearest, subnormals kept.
            x86_64::write(0x1f80);
            Self { saved }
        }
        #[cfg(target_arch = "aarch64")]
        {
            let saved = aarch64::read();
            aarch64::write(0);
            Self { saved }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        Self {}
    }
}

impl Drop for DefaultFloat {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        x86_64::write(self.saved);
        #[cfg(target_arch = "aarch64")]
        aarch64::write(self.saved);
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86_64 {
    use std::arch::asm;

    pub(super) fn read() -> u32 {
        let mut value = 0u32;
        // SAFETY: stmxcsr stores four bytes to the address given, that of a live u32.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack)) };
        value
    }

    pub(super) fn write(value: u32) {
        // SAFETY: the value is either the architectural default or one read from this register, so
        // no reserved bit is set and every exception stays masked as Rust requires.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, readonly)) };
    }
}

#[cfg(target_arch = "aarch64")]
#[allow(unsafe_code)]
mod aarch64 {
    use std::arch::asm;

    pub(super) fn read() -> u64 {
        let value: u64;
        // SAFETY: reading FPCR has no other effect.
        unsafe { asm!("mrs {}, fpcr", out(reg) value, options(nomem, nostack)) };
        value
    }

    pub(super) fn write(value: u64) {
        // SAFETY: zero is the architectural default; any other value was read from this register.
        unsafe { asm!("msr fpcr, {}", in(reg) value, options(nomem, nostack)) };
    }
}
