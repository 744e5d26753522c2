//! Which prefix of one model's names becomes which of the other's, and whether that is certain.

use super::counts::{Counts, Prefixes};
use super::names::{TensorIndex, join, suffix_after};
use crate::error::{Error, Result};

/// Whether equal names may decide between two ways to match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ties {
    /// Two pairs of prefixes that explain everything are an error.
    Refuse,
    /// Equal prefixes win, as where a model's own names are looked up in it.
    PreferEqualNames,
}

/// The tensors of two models.
pub(super) struct Models<'a> {
    pub(super) reasoning: TensorIndex<'a>,
    pub(super) multimodal: TensorIndex<'a>,
}

impl Models<'_> {
    /// The multimodal tensor of the name that prefixes give to a reasoning tensor.
    pub(super) fn namesake(&self, prefixes: &Prefixes, position: usize) -> Option<usize> {
        let suffix = suffix_after(&self.reasoning.names[position], &prefixes.0)?;
        self.multimodal.find(&join(&prefixes.1, suffix))
    }

    pub(super) fn same_shape(&self, position: usize, other: usize) -> bool {
        self.reasoning.shape(position) == self.multimodal.shape(other)
    }

    /// The match of a reasoning tensor: its namesake, where that has its shape.
    pub(super) fn matched(&self, prefixes: &Prefixes, position: usize) -> Option<usize> {
        self.namesake(prefixes, position).filter(|&other| self.same_shape(position, other))
    }

    /// Refuse prefixes beside which others could be meant.
    ///
    /// # Errors
    /// Two language models that fit equally well.
    pub(super) fn refuse_ambiguity(
        &self,
        chosen: &Prefixes,
        by_shape: &Counts<'_>,
        ties: Ties,
    ) -> Result<()> {
        if ties == Ties::PreferEqualNames && chosen.0 == chosen.1 {
            return Ok(());
        }
        let layers = self.reasoning.layer_positions().count();
        let matched = |&at: &usize| self.matched(chosen, at).is_some();
        let matched = self.reasoning.layer_positions().filter(matched).count();
        // Prefixes that leave layer parameters without a match (a vision tower whose query
        // projections happen to fit) cannot be the language model's, if the chosen ones leave none.
        // Where neither explains all of it, a tower is recognized by what it lacks: gates, say.
        let other = match matched {
            0 => None,
            _ if matched == layers => by_shape.first_complete(chosen, layers),
            _ => by_shape.first_comparable(chosen, matched)?,
        };
        other.map_or(Ok(()), |(other, count)| Err(self.ambiguous(chosen, &other, count)))
    }

    fn ambiguous(&self, chosen: &Prefixes, other: &Prefixes, count: usize) -> Error {
        let mut layers = self.reasoning.layer_positions();
        let example = |prefixes: &Prefixes| {
            self.reasoning
                .layer_positions()
                .find_map(|at| self.namesake(prefixes, at))
                .map_or("", |at| &self.multimodal.tensors[at].name)
        };
        let first = layers.find(|&at| self.namesake(other, at).is_some());
        Error::Ambiguous(format!(
            "two alignments fit: {} could be {} or {} ({count} tensors match in the second way); \
             nothing shows which is meant, so neither is taken. Say which with the mapping {} or {}",
            first.map_or("", |at| &self.reasoning.tensors[at].name),
            example(chosen),
            example(other),
            self.stated(chosen),
            self.stated(other),
        ))
    }

    /// Prefixes as a mapping states them, such as `model:model.language_model`.
    fn stated(&self, prefixes: &Prefixes) -> String {
        let pair = self.reasoning.layer_positions().find_map(|at| {
            let other = self.namesake(prefixes, at)?;
            Some((&self.reasoning.tensors[at].name, &self.multimodal.tensors[other].name))
        });
        let Some((name, other)) = pair else { return String::new() };
        let (mut first, mut second): (Vec<&str>, Vec<&str>) =
            (name.split('.').collect(), other.split('.').collect());
        // A prefix that is empty would be right, and read by nobody.
        while first.len().min(second.len()) > 1 && first.last() == second.last() {
            first.pop();
            second.pop();
        }
        format!("{}:{}", first.join("."), second.join("."))
    }
}
