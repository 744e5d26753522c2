//! Write differences whose scale must be known before their first element: measure, then write.
//!
//! Done over groups of tensors, small enough that what the second pass reads is still in the page
//! cache. The scale follows from the first pass alone, so neither threads nor groups change a bit.

use std::ops::ControlFlow;

use crate::error::Result;
use crate::kernel::exponent_for;
use crate::storage::Storage;
use crate::stream::{Options, Outcome, Pair, Progress, Sink, run};
use crate::writer::Writer;

/// Stored bytes of both sides that are measured before they are written; one tensor may have more.
const GROUP_NBYTES: u64 = 256 << 20;

/// Stream every pair into a delta and return the moments of each, as [`run`] does.
///
/// # Errors
/// As [`run`].
pub fn write(
    pairs: &[Pair<'_>],
    writer: &Writer,
    options: &Options,
    tick: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Outcome> {
    if writer.storage() != Storage::E4m3 {
        return run(pairs, Sink::Files(writer, 0), options, tick);
    }
    let mut moments = Vec::with_capacity(pairs.len());
    let mut peak_nbytes = 0;
    let mut spectra = Vec::new();
    // The first pass has them.
    let again = Options { singular: None, ..*options };
    let mut done = Progress::default();
    for group in groups(pairs) {
        let first = moments.len();
        // Each byte is read twice, and counts half each time.
        let mut half = 0;
        let measured = run(group, Sink::None, options, &mut |now| {
            half = now.nbytes / 2;
            tick(Progress { tensors: done.tensors, nbytes: done.nbytes + half })
        })?;
        for (index, of_pair) in measured.moments.iter().enumerate() {
            writer.set_exponent(first + index, exponent_for(of_pair.max_abs))?;
        }
        let mut read = 0;
        let written = run(group, Sink::Files(writer, first), &again, &mut |now| {
            read = half + now.nbytes.div_ceil(2);
            tick(Progress { tensors: done.tensors + now.tensors, nbytes: done.nbytes + read })
        })?;
        peak_nbytes = peak_nbytes.max(measured.peak_nbytes).max(written.peak_nbytes);
        moments.extend(written.moments);
        spectra.extend(measured.spectra);
        done.tensors += group.len();
        done.nbytes += read;
    }
    Ok(Outcome { moments, peak_nbytes, spectra })
}

/// Neighbouring pairs of about [`GROUP_NBYTES`] together.
fn groups<'p, 'a>(pairs: &'p [Pair<'a>]) -> Vec<&'p [Pair<'a>]> {
    let mut groups = Vec::new();
    let (mut start, mut total) = (0, 0);
    for (index, pair) in pairs.iter().enumerate() {
        let nbytes = 2 * (pair.multimodal.tensor.range.end - pair.multimodal.tensor.range.start);
        if index > start && total + nbytes > GROUP_NBYTES {
            groups.push(&pairs[start..index]);
            (start, total) = (index, 0);
        }
        total += nbytes;
    }
    groups.push(&pairs[start..]);
    groups
}
