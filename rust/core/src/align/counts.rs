//! How many tensors each pair of prefixes matches, counted in a pass over both models' names.
//!
//! A name is cut into a prefix and a suffix in every way that keeps two components of suffix and no layer
//! number in the prefix, so that layers cannot shift. Two names match under the prefixes of two cuts
//! whose suffixes are equal. Prefixes that end alike map names as the same ones without that ending do,
//! which match at least as much, so they are not counted. Names come from strangers: how many suffixes
//! there are and how many cuts match is limited, and what is done grows with those alone.

use std::collections::{HashMap, HashSet};

use super::names::{TensorIndex, is_number};
use crate::error::{Error, Result};
use crate::interrupt;

/// Endings of names, of one component or more. Of the models that there are each tensor adds
/// about four.
const SUFFIXES: usize = 1 << 22;
/// Cuts of the two models that match: some for each tensor, and a number more.
const MATCHES_OF_TENSOR: usize = 16;
const MATCHES_MORE: usize = 1 << 19;
const MATCHES_AT_MOST: usize = 1 << 22;

/// What the reasoning model's names begin with, and the multimodal model's in its place.
pub(super) type Prefixes = (String, String);

/// A pair of prefixes, each by its number in its model.
type Key = (u32, u32);

/// What a pair of prefixes matches.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    /// Tensors, by cuts that keep two components of suffix.
    tensors: u32,
    /// Parameters of numbered layers.
    layered: u32,
}

/// The counts of all pairs of prefixes.
pub(super) struct Counts<'a> {
    cuts: &'a Cuts<'a>,
    by_key: HashMap<Key, Count>,
}

/// The names of two models, cut.
pub(super) struct Cuts<'a> {
    reasoning: Side<'a>,
    multimodal: Side<'a>,
    limit: usize,
}

/// One model's cuts, by suffix and shape.
#[derive(Default)]
struct Side<'a> {
    prefixes: Vec<&'a str>,
    /// The last component of each prefix.
    endings: Vec<u32>,
    cuts: Vec<Cut>,
    /// What follows the layer number of each tensor in a layer.
    modules: Vec<Option<u32>>,
}

#[derive(Clone, Copy)]
struct Cut {
    suffix: u32,
    shape: u32,
    prefix: u32,
    tensor: u32,
    /// Whether two components are left; the number of a layer alone counts for layers only.
    is_whole: bool,
}

/// Texts and shapes as numbers, and suffixes as the nodes of a tree that grows at their front.
#[derive(Default)]
struct Numbers<'a> {
    components: HashMap<&'a str, u32>,
    shapes: HashMap<&'a [usize], u32>,
    suffixes: HashMap<(u32, u32), u32>,
}

impl<'a> Cuts<'a> {
    /// Cut the names of both models.
    ///
    /// # Errors
    /// More different suffixes than the limit.
    pub(super) fn new(
        reasoning: &'a TensorIndex<'_>,
        multimodal: &'a TensorIndex<'_>,
    ) -> Result<Self> {
        let mut numbers = Numbers::default();
        let tensors = reasoning.names.len() + multimodal.names.len();
        let reasoning = Side::new(reasoning, &mut numbers)?;
        let mut multimodal = Side::new(multimodal, &mut numbers)?;
        multimodal.cuts.sort_unstable_by_key(|cut| (cut.suffix, cut.shape, cut.tensor, cut.prefix));
        let limit = (MATCHES_OF_TENSOR * tensors + MATCHES_MORE).min(MATCHES_AT_MOST);
        Ok(Self { reasoning, multimodal, limit })
    }

    /// Count what each pair of prefixes matches by name and, with `shapes`, by shape.
    ///
    /// # Errors
    /// More cuts that match than the limit.
    pub(super) fn count(&self, shapes: bool) -> Result<Counts<'_>> {
        let mut by_key: HashMap<Key, Count> = HashMap::new();
        self.each_match(shapes, |key, tensor, is_whole| {
            let count = by_key.entry(key).or_default();
            count.tensors += u32::from(is_whole);
            count.layered += u32::from(self.reasoning.modules[tensor].is_some());
        })?;
        Ok(Counts { cuts: self, by_key })
    }

    /// How many different modules of a layer each of some pairs of prefixes matches in any layer.
    fn modules(&self, wanted: &HashSet<Key>) -> Result<HashMap<Key, usize>> {
        let mut found: HashSet<(Key, u32)> = HashSet::new();
        self.each_match(true, |key, tensor, _| {
            if let Some(module) = self.reasoning.modules[tensor].filter(|_| wanted.contains(&key)) {
                found.insert((key, module));
            }
        })?;
        let mut modules = HashMap::new();
        for (key, _) in found {
            *modules.entry(key).or_default() += 1;
        }
        Ok(modules)
    }

    /// Visit each match of two cuts: the prefixes, the reasoning tensor, and whether two components
    /// of suffix are left.
    fn each_match(&self, shapes: bool, mut visit: impl FnMut(Key, usize, bool)) -> Result<()> {
        let shape = |cut: &Cut| if shapes { cut.shape } else { 0 };
        let mut visited = 0;
        for cut in &self.reasoning.cuts {
            interrupt::poll()?;
            let wanted = (cut.suffix, shape(cut));
            let others = &self.multimodal.cuts;
            let start = others.partition_point(|other| (other.suffix, shape(other)) < wanted);
            for other in
                others[start..].iter().take_while(|other| (other.suffix, shape(other)) == wanted)
            {
                visited += 1;
                if visited > self.limit {
                    return Err(self.too_alike(cut));
                }
                let key = (cut.prefix, other.prefix);
                let both_have_one = cut.prefix != 0 && other.prefix != 0;
                let end_alike = self.reasoning.endings[cut.prefix as usize]
                    == self.multimodal.endings[other.prefix as usize];
                if !(both_have_one && end_alike) {
                    visit(key, cut.tensor as usize, cut.is_whole && other.is_whole);
                }
            }
        }
        Ok(())
    }

    fn too_alike(&self, cut: &Cut) -> Error {
        Error::Alignment(format!(
            "the names of the two models are too alike to be matched: they end alike in more than \
             {} ways, which is the limit, as what follows {:?} in one does. Give a mapping, or \
             leave out the tensors that are not the language model's",
            self.limit, self.reasoning.prefixes[cut.prefix as usize]
        ))
    }
}

impl Counts<'_> {
    /// Most matches; among equals the shortest prefixes, which reach furthest.
    pub(super) fn best(&self) -> Option<(Prefixes, usize)> {
        self.whole()
            .max_by_key(|&(key, count)| {
                let (first, second) = self.texts(key);
                (count.tensors, std::cmp::Reverse(first.len() + second.len()), (first, second))
            })
            .map(|(key, count)| (self.prefixes(key), count.tensors as usize))
    }

    /// The first `most` pairs of prefixes that map names differently than the chosen one, most
    /// matches first.
    pub(super) fn alternatives(&self, chosen: &Prefixes, most: usize) -> Vec<(Prefixes, usize)> {
        let mut first: Vec<(Key, Count)> = Vec::with_capacity(most + 1);
        for found in self.others(chosen) {
            let at = first.partition_point(|kept| self.order(kept) < self.order(&found));
            if at < most {
                first.insert(at, found);
                first.truncate(most);
            }
        }
        first.into_iter().map(|(key, count)| (self.prefixes(key), count.tensors as usize)).collect()
    }

    /// The first alternative that gives each of `layers` layer parameters a match.
    pub(super) fn first_complete(
        &self,
        chosen: &Prefixes,
        layers: usize,
    ) -> Option<(Prefixes, usize)> {
        self.first(self.others(chosen).filter(|(_, count)| count.layered as usize == layers))
    }

    /// The first alternative that matches half as many tensors as `matched`, and three quarters of
    /// the modules that the chosen prefixes match.
    pub(super) fn first_comparable(
        &self,
        chosen: &Prefixes,
        matched: usize,
    ) -> Result<Option<(Prefixes, usize)>> {
        let likely: Vec<(Key, Count)> = self
            .others(chosen)
            .filter(|(_, count)| 2 * count.tensors as usize >= matched)
            .collect();
        let own = self.whole().find(|&(key, _)| self.texts(key) == as_texts(chosen));
        let wanted = likely.iter().chain(&own).map(|&(key, _)| key).collect();
        let modules = self.cuts.modules(&wanted)?;
        let of = |key: &Key| modules.get(key).copied().unwrap_or_default();
        let least = 3 * own.map_or(0, |(key, _)| of(&key));
        Ok(self.first(likely.into_iter().filter(|(key, _)| 4 * of(key) >= least)))
    }

    fn first(&self, found: impl Iterator<Item = (Key, Count)>) -> Option<(Prefixes, usize)> {
        found
            .min_by(|one, other| self.order(one).cmp(&self.order(other)))
            .map(|(key, count)| (self.prefixes(key), count.tensors as usize))
    }

    fn others(&self, chosen: &Prefixes) -> impl Iterator<Item = (Key, Count)> {
        self.whole().filter(move |&(key, _)| self.texts(key) != as_texts(chosen))
    }

    fn whole(&self) -> impl Iterator<Item = (Key, Count)> {
        let counts = self.by_key.iter().map(|(&key, &count)| (key, count));
        counts.filter(|(_, count)| count.tensors > 0)
    }

    fn order(&self, &(key, count): &(Key, Count)) -> (std::cmp::Reverse<u32>, (&str, &str)) {
        (std::cmp::Reverse(count.tensors), self.texts(key))
    }

    fn texts(&self, (first, second): Key) -> (&str, &str) {
        let Cuts { reasoning, multimodal, .. } = self.cuts;
        (reasoning.prefixes[first as usize], multimodal.prefixes[second as usize])
    }

    fn prefixes(&self, key: Key) -> Prefixes {
        let (first, second) = self.texts(key);
        (first.to_owned(), second.to_owned())
    }
}

fn as_texts((first, second): &Prefixes) -> (&str, &str) {
    (first, second)
}

impl<'a> Side<'a> {
    fn new(index: &'a TensorIndex<'_>, numbers: &mut Numbers<'a>) -> Result<Self> {
        // The first prefix is the empty one, which has no last component.
        let mut side = Side { prefixes: vec![""], endings: vec![0], ..Self::default() };
        let mut prefix_of: HashMap<(u32, u32), u32> = HashMap::new();
        let mut parts: Vec<(usize, u32)> = Vec::new();
        let mut suffixes: Vec<u32> = Vec::new();
        for (tensor, name) in index.names.iter().enumerate() {
            interrupt::poll()?;
            let shape = numbers.shape(index.shape(tensor));
            parts.clear();
            let mut number = None;
            let mut at = 0;
            for (place, part) in name.split('.').enumerate() {
                if number.is_none() && is_number(part) {
                    number = Some(place);
                }
                at += part.len();
                parts.push((at, numbers.component(part)));
                at += 1;
            }
            numbers.suffixes(&parts, &mut suffixes)?;
            side.modules.push(number.map(|at| suffixes.get(at + 1).copied().unwrap_or_default()));
            let last = parts.len().saturating_sub(2);
            let mut prefix = 0;
            for kept in 0..=number.unwrap_or(last) {
                if kept > 0 {
                    let (end, component) = parts[kept - 1];
                    prefix = *prefix_of.entry((prefix, component)).or_insert_with(|| {
                        side.prefixes.push(&name[..end]);
                        side.endings.push(component);
                        (side.prefixes.len() - 1) as u32
                    });
                    if end == 0 {
                        // A name that begins with a dot: no prefix is empty but the first.
                        continue;
                    }
                }
                let is_whole = kept <= last;
                let tensor = tensor as u32;
                let suffix = suffixes[kept];
                side.cuts.push(Cut { suffix, shape, prefix, tensor, is_whole });
            }
        }
        Ok(side)
    }
}

impl<'a> Numbers<'a> {
    fn component(&mut self, text: &'a str) -> u32 {
        let next = self.components.len() as u32 + 1;
        *self.components.entry(text).or_insert(next)
    }

    fn shape(&mut self, shape: &'a [usize]) -> u32 {
        let next = self.shapes.len() as u32;
        *self.shapes.entry(shape).or_insert(next)
    }

    /// The suffix that begins with each of a name's components.
    fn suffixes(&mut self, parts: &[(usize, u32)], out: &mut Vec<u32>) -> Result<()> {
        out.clear();
        let mut suffix = 0;
        for &(_, component) in parts.iter().rev() {
            let next = self.suffixes.len() as u32 + 1;
            suffix = *self.suffixes.entry((suffix, component)).or_insert(next);
            out.push(suffix);
        }
        out.reverse();
        if self.suffixes.len() > SUFFIXES {
            return Err(Error::Alignment(format!(
                "the names of the two models have more than {SUFFIXES} different endings, which is \
                 the limit; leave out the tensors that are not the language model's"
            )));
        }
        Ok(())
    }
}
