//! The match of prefixes written down as it is defined, without regard to time, and held against
//! the one in use.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::counts::Prefixes;
use super::names::{Named, TensorIndex, in_layer, is_number, suffix_after};
use super::prefixes::{Models, Ties};
use super::{SHOWN, align};
use crate::error::Error;

type Counts = BTreeMap<Prefixes, usize>;

/// Every way to cut a name that keeps two components of suffix and no number in the prefix.
fn cuts(name: &str) -> Vec<(&str, &str)> {
    let dots: Vec<usize> = name.match_indices('.').map(|(at, _)| at).collect();
    let mut found = vec![("", name)];
    for &at in &dots[..dots.len().saturating_sub(1)] {
        if !in_layer(&name[..at]) {
            found.push((&name[..at], &name[at + 1..]));
        }
    }
    found
}

fn count(models: &Models<'_>, shapes: bool) -> Counts {
    let mut counts = Counts::new();
    for (position, name) in models.reasoning.names.iter().enumerate() {
        for (other, target) in models.multimodal.names.iter().enumerate() {
            if shapes && !models.same_shape(position, other) {
                continue;
            }
            for (first, suffix) in cuts(name) {
                for (second, _) in cuts(target).into_iter().filter(|(_, end)| *end == suffix) {
                    *counts.entry((first.to_owned(), second.to_owned())).or_default() += 1;
                }
            }
        }
    }
    counts
}

fn best(counts: &Counts) -> Option<Prefixes> {
    let reach = |(first, second): &Prefixes| first.len() + second.len();
    counts
        .iter()
        .max_by(|(p, n), (q, m)| n.cmp(m).then_with(|| reach(q).cmp(&reach(p))))
        .map(|(prefixes, _)| prefixes.clone())
}

fn same_mapping(x: &Prefixes, y: &Prefixes) -> bool {
    let tail = |long: &str, short: &str| -> Option<String> {
        if long == short {
            Some(String::new())
        } else {
            suffix_after(long, short).map(str::to_owned)
        }
    };
    let extends = |long: &Prefixes, short: &Prefixes| {
        let (first, second) = (tail(&long.0, &short.0), tail(&long.1, &short.1));
        first.is_some() && first == second
    };
    extends(x, y) || extends(y, x)
}

fn layers(models: &Models<'_>, prefixes: &Prefixes) -> (usize, usize, usize) {
    let mut modules = BTreeSet::new();
    let (mut all, mut matched) = (0, 0);
    for position in models.reasoning.layer_positions() {
        all += 1;
        if models.matched(prefixes, position).is_some() {
            matched += 1;
            let mut parts = models.reasoning.names[position].split('.');
            parts.find(|part| is_number(part));
            modules.insert(parts.collect::<Vec<_>>().join("."));
        }
    }
    (all, matched, modules.len())
}

/// The prefixes chosen, those shown beside them, and the ones that make the match ambiguous.
type Answer = (Prefixes, Vec<(String, String, usize)>, bool);

fn expected(models: &Models<'_>, ties: Ties) -> Option<Answer> {
    let (by_shape, by_name) = (count(models, true), count(models, false));
    let shaped = best(&by_shape)?;
    let named = best(&by_name)?;
    let chosen = if by_name[&named] >= 2 * by_shape[&shaped] { named } else { shaped };
    let mut others: Vec<_> =
        by_shape.iter().filter(|(prefixes, _)| !same_mapping(prefixes, &chosen)).collect();
    others.sort_by(|x, y| y.1.cmp(x.1).then_with(|| x.0.cmp(y.0)));
    let (all, matched, modules) = layers(models, &chosen);
    let decided = ties == Ties::PreferEqualNames && chosen.0 == chosen.1;
    let is_ambiguous = !decided
        && others.iter().any(|(other, number)| {
            let (_, also, also_modules) = layers(models, other);
            if matched == all {
                all > 0 && also == all
            } else {
                matched > 0 && 2 * **number >= matched && 4 * also_modules >= 3 * modules
            }
        });
    let mut shown: Vec<(String, String, usize)> = Vec::new();
    for (other, number) in others {
        let known = |(first, second, _): &(String, String, usize)| {
            same_mapping(other, &(first.clone(), second.clone()))
        };
        if shown.len() < SHOWN && !shown.iter().any(known) {
            shown.push((other.0.clone(), other.1.clone(), *number));
        }
    }
    Some((chosen, shown, is_ambiguous))
}

fn model() -> impl Strategy<Value = Vec<Named>> {
    let component = prop::sample::select(vec!["a", "b", "lm", "0", "1", "w"]);
    let name = prop::collection::vec(component, 1..5).prop_map(|parts| parts.join("."));
    let shape = prop::sample::select(vec![vec![2], vec![2, 2]]);
    prop::collection::btree_map(name, shape, 1..14).prop_map(|tensors| {
        tensors.into_iter().map(|(name, shape)| Named { name, shape }).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn prefixes_are_found_as_they_are_defined(
        reasoning in model(), multimodal in model(), prefer in any::<bool>()
    ) {
        let ties = if prefer { Ties::PreferEqualNames } else { Ties::Refuse };
        let models = Models {
            reasoning: TensorIndex::new(&reasoning).unwrap(),
            multimodal: TensorIndex::new(&multimodal).unwrap(),
        };
        let found = align(&reasoning, &multimodal, ties);
        match (expected(&models, ties), found) {
            (None, found) => prop_assert!(matches!(found, Err(Error::Alignment(_)))),
            (Some((_, _, true)), found) => prop_assert!(matches!(found, Err(Error::Ambiguous(_)))),
            (Some((chosen, shown, false)), found) => {
                let found = found.unwrap();
                prop_assert_eq!(found.prefixes, chosen);
                prop_assert_eq!(found.alternatives, shown);
            }
        }
    }
}
