//! Which prefix of one model's names becomes which of the other's, and whether that is certain.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::names::{TensorIndex, cuts, is_number, join, suffix_after};
use crate::error::{Error, Result};

/// Other pairs of prefixes that are shown.
const SHOWN: usize = 3;

/// Whether equal names may decide between two ways to match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ties {
    /// Two pairs of prefixes that explain everything are an error.
    Refuse,
    /// Equal prefixes win, as where a model's own names are looked up in it.
    PreferEqualNames,
}

/// What the reasoning model's names begin with, and the multimodal model's in its place.
pub(super) type Prefixes = (String, String);

/// The tensors of two models.
pub(super) struct Models<'a> {
    pub(super) reasoning: TensorIndex<'a>,
    pub(super) multimodal: TensorIndex<'a>,
}

impl Models<'_> {
    /// How many tensors each pair of prefixes matches, by name and, with `shapes`, by shape.
    pub(super) fn count_prefixes(&self, shapes: bool) -> BTreeMap<Prefixes, usize> {
        let shape = |index: &TensorIndex<'_>, position: usize| -> Vec<usize> {
            if shapes { index.shape(position).to_vec() } else { Vec::new() }
        };
        let mut by_suffix: HashMap<(&str, Vec<usize>), Vec<&str>> = HashMap::new();
        for (position, name) in self.multimodal.names.iter().enumerate() {
            for (prefix, suffix) in cuts(name) {
                let key = (suffix, shape(&self.multimodal, position));
                by_suffix.entry(key).or_default().push(prefix);
            }
        }
        let mut counts: HashMap<(&str, &str), usize> = HashMap::new();
        for (position, name) in self.reasoning.names.iter().enumerate() {
            let shape = shape(&self.reasoning, position);
            for (prefix, suffix) in cuts(name) {
                for other in by_suffix.get(&(suffix, shape.clone())).into_iter().flatten() {
                    *counts.entry((prefix, other)).or_default() += 1;
                }
            }
        }
        let owned = |(first, second): (&str, &str)| (first.to_owned(), second.to_owned());
        counts.into_iter().map(|(prefixes, count)| (owned(prefixes), count)).collect()
    }

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

    /// Whether a pair of prefixes gives every layer parameter of the reasoning model a match.
    fn explains_every_layer(&self, prefixes: &Prefixes) -> bool {
        let mut any = false;
        self.reasoning.layer_positions().all(|position| {
            any = true;
            self.matched(prefixes, position).is_some()
        }) && any
    }

    /// How many modules of a layer a pair of prefixes matches in any layer.
    fn modules(&self, prefixes: &Prefixes) -> usize {
        self.reasoning
            .layer_positions()
            .filter(|&position| self.matched(prefixes, position).is_some())
            .map(|position| {
                let parts: Vec<&str> = self.reasoning.names[position].split('.').collect();
                let layer = parts.iter().position(|part| is_number(part)).unwrap_or_default();
                parts[layer..].iter().skip(1).copied().collect::<Vec<_>>().join(".")
            })
            .collect::<BTreeSet<_>>()
            .len()
    }

    /// Refuse prefixes beside which others could be meant.
    ///
    /// # Errors
    /// Two language models that fit equally well.
    pub(super) fn refuse_ambiguity(
        &self,
        chosen: &Prefixes,
        alternatives: &[(Prefixes, usize)],
        ties: Ties,
    ) -> Result<()> {
        if ties == Ties::PreferEqualNames && chosen.0 == chosen.1 {
            return Ok(());
        }
        let complete = self.explains_every_layer(chosen);
        let layers = || self.reasoning.layer_positions();
        let matched = layers().filter(|&at| self.matched(chosen, at).is_some()).count();
        let modules = self.modules(chosen);
        for (other, count) in alternatives {
            // Prefixes that leave layer parameters without a match (a vision tower whose query
            // projections happen to fit) cannot be the language model's, if the chosen ones leave
            // none. Where neither explains all of it, a tower is recognized by what it lacks: gates,
            // say.
            let conflict = if complete {
                self.explains_every_layer(other)
            } else {
                matched > 0 && 2 * count >= matched && 4 * self.modules(other) >= 3 * modules
            };
            if conflict {
                return Err(self.ambiguous(chosen, other, *count));
            }
        }
        Ok(())
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
             nothing shows which is meant, so neither is taken. Save the language model that is \
             meant as a checkpoint of its own and align with that",
            first.map_or("", |at| &self.reasoning.tensors[at].name),
            example(chosen),
            example(other),
        ))
    }
}

/// Most matches; among equals the shortest prefixes, which reach furthest.
pub(super) fn best(counts: &BTreeMap<Prefixes, usize>) -> Option<Prefixes> {
    counts
        .iter()
        .max_by(|(p, n), (q, m)| {
            n.cmp(m).then_with(|| (q.0.len() + q.1.len()).cmp(&(p.0.len() + p.1.len())))
        })
        .map(|(prefixes, _)| prefixes.clone())
}

/// Pairs of prefixes that map names differently than the chosen one, most matches first.
pub(super) fn alternatives(
    counts: &BTreeMap<Prefixes, usize>,
    chosen: &Prefixes,
) -> Vec<(Prefixes, usize)> {
    let mut found: Vec<_> = counts
        .iter()
        .filter(|(prefixes, _)| !same_mapping(prefixes, chosen))
        .map(|(prefixes, &count)| (prefixes.clone(), count))
        .collect();
    found.sort_by(|x, y| y.1.cmp(&x.1).then_with(|| x.0.cmp(&y.0)));
    found
}

/// The first alternatives that map names differently from each other.
pub(super) fn distinct(alternatives: Vec<(Prefixes, usize)>) -> Vec<(String, String, usize)> {
    let mut kept: Vec<(Prefixes, usize)> = Vec::new();
    for (prefixes, count) in alternatives {
        if !kept.iter().any(|(other, _)| same_mapping(&prefixes, other)) {
            kept.push((prefixes, count));
        }
        if kept.len() == SHOWN {
            break;
        }
    }
    kept.into_iter().map(|((first, second), count)| (first, second, count)).collect()
}

/// Whether two pairs of prefixes map every name that both match to the same name.
fn same_mapping(x: &Prefixes, y: &Prefixes) -> bool {
    let extends = |long: &Prefixes, short: &Prefixes| {
        let tail = |long: &str, short: &str| -> Option<String> {
            if long == short {
                return Some(String::new());
            }
            suffix_after(long, short).map(str::to_owned)
        };
        match (tail(&long.0, &short.0), tail(&long.1, &short.1)) {
            (Some(first), Some(second)) => first == second,
            _ => false,
        }
    };
    extends(x, y) || extends(y, x)
}
