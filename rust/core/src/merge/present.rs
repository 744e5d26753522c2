//! Which elements of a chunk every model of a merge stores.

use std::ops::Range;

use super::job::Blend;

impl Blend<'_> {
    /// The elements of a range that every model stores.
    pub(super) fn present(&self, elements: &Range<usize>) -> Vec<Range<usize>> {
        let reasoning = self.reasoning.present(elements);
        match &self.base {
            None => reasoning,
            Some(base) => common(&reasoning, &base.present(elements)),
        }
    }
}

/// The intersection of two lists of ascending ranges.
pub(super) fn common(first: &[Range<usize>], second: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut i, mut j) = (0, 0);
    let mut found = Vec::new();
    while let (Some(a), Some(b)) = (first.get(i), second.get(j)) {
        let (start, end) = (a.start.max(b.start), a.end.min(b.end));
        if start < end {
            found.push(start..end);
        }
        if a.end <= b.end { i += 1 } else { j += 1 }
    }
    found
}

/// The elements of a range that ascending ranges leave out.
pub(super) fn absent(present: &[Range<usize>], elements: &Range<usize>) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = elements.start;
    for run in present.iter().chain(std::iter::once(&(elements.end..elements.end))) {
        if start < run.start {
            found.push(start..run.start);
        }
        start = run.end;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_lists_of_ranges_meet_where_both_have_elements() {
        assert_eq!(common(&[0..4, 6..10], &[2..7, 9..20]), [2..4, 6..7, 9..10]);
        assert!(common(&[0..4, 5..6], &[4..5, 6..9]).is_empty());
    }

    #[test]
    fn what_ranges_leave_is_between_and_around_them() {
        assert_eq!(absent(&[2..4, 4..5, 7..9], &(1..9)), [1..2, 5..7]);
        assert_eq!(absent(&[0..4, 6..7], &(0..9)), [4..6, 7..9]);
        let all = std::slice::from_ref(&(3..9));
        assert_eq!(absent(&[], &(3..9)), all);
        assert!(absent(all, &(3..9)).is_empty());
    }
}
