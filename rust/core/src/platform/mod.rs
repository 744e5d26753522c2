//! What differs between operating systems; nothing else asks which one it runs on.
//!
//! Both files have the same functions. Advice that a system does not take costs time or memory alone.

#[cfg(unix)]
mod unix;
#[cfg(unix)]
pub(crate) use unix::*;

#[cfg(windows)]
mod windows;
#[cfg(windows)]
pub(crate) use windows::*;
