//! Tensors put together from blocks and partly downloaded files, through real files on disk.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::ops::ControlFlow;
use std::path::Path;

use drift_fast_core::align::compose::{Block, Blocks};
use drift_fast_core::align::pair::{Pair, Source};
use drift_fast_core::checkpoint::Checkpoint;
use drift_fast_core::checkpoint::Operand;
use drift_fast_core::stream::{Detail, Difference, Landed, Memory, Options, load_differences};
use drift_fast_core::{Dtype, Error, Reader};
use proptest::prelude::*;

fn write(path: &Path, tensors: &[(&str, Vec<usize>, Vec<f32>)]) {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for (name, shape, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        entries.push(format!(
            "{name:?}:{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{start},{}]}}",
            data.len()
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

fn operand<'a>(checkpoint: &'a Checkpoint, name: &str) -> Operand<'a> {
    let (shard, tensor) = checkpoint.tensor(name).unwrap();
    Operand { shard, tensor, scales: None }
}

/// Δ of one pair in float32.
fn difference(pair: Pair<'_>, numel: usize, threads: usize) -> drift_fast_core::Result<Vec<f32>> {
    let mut bytes = vec![0xff; numel * 4];
    let wanted = [Difference { pair, elements: 0..numel }];
    let memory = Memory::Each(vec![&mut bytes]);
    let landed: Landed<'_> = &mut |_| ControlFlow::Continue(0);
    load_differences(&wanted, Dtype::F32, memory, &Options::new(threads), Detail::Faults, landed)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
}

/// A tensor of `rows` × `columns` cut into bands of rows, some of them absent, and each of the others
/// into columns of stored tensors, straight or transposed, after some padding.
#[derive(Debug, Clone)]
struct Plan {
    columns: usize,
    bands: Vec<Option<(usize, Vec<Piece>)>>,
    gaps: Vec<usize>,
}

/// Columns, whether transposed, elements of padding.
type Piece = (usize, bool, usize);

fn plan() -> impl Strategy<Value = Plan> {
    let pieces = prop::collection::vec((1usize..5, any::<bool>(), 0usize..4), 1..4);
    let bands = prop::collection::vec((1usize..6, 0usize..3, any::<bool>()), 1..4);
    (pieces, bands).prop_map(|(pieces, bands)| Plan {
        columns: pieces.iter().map(|piece| piece.0).sum(),
        gaps: bands.iter().map(|band| band.1).collect(),
        bands: bands
            .iter()
            .map(|band| (band.2 || band.1 == 0).then(|| (band.0, pieces.clone())))
            .collect(),
    })
}

proptest! {
    #[test]
    fn a_difference_takes_each_element_from_its_block(plan in plan(), threads in 1usize..4) {
        let directory = tempfile::tempdir().unwrap();
        let mut stored: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        let mut places = Vec::new();
        let mut expected: Vec<f32> = Vec::new();
        let mut next = 1.0;
        let mut row = 0;
        for (band, gap) in plan.bands.iter().zip(&plan.gaps) {
            expected.extend(std::iter::repeat_n(0.0, gap * plan.columns));
            row += gap;
            let Some((rows, pieces)) = band else { continue };
            let mut values = vec![0.0; rows * plan.columns];
            let mut column = 0;
            for &(width, transposed, padding) in pieces {
                let mut data = vec![-7.0; padding];
                let (outer, inner) = if transposed { (width, *rows) } else { (*rows, width) };
                for i in 0..outer {
                    for j in 0..inner {
                        let (r, c) = if transposed { (j, i) } else { (i, j) };
                        values[r * plan.columns + column + c] = next;
                        data.push(next);
                        next += 1.0;
                    }
                }
                let strides = if transposed { (1, *rows) } else { (width, 1) };
                let name = format!("t{}", stored.len());
                places.push((name.clone(), row..row + rows, column..column + width, padding, strides));
                stored.push((name, vec![data.len()], data));
                column += width;
            }
            expected.extend(values);
            row += rows;
        }
        prop_assume!(!places.is_empty());
        let path = directory.path().join("a.safetensors");
        let tensors: Vec<_> =
            stored.iter().map(|(n, s, v)| (n.as_str(), s.clone(), v.clone())).collect();
        write(&path, &tensors);
        let other = directory.path().join("b.safetensors");
        let numel = row * plan.columns;
        write(&other, &[("w", vec![row, plan.columns], vec![0.5; numel])]);
        let a = Checkpoint::open(&path, Reader::Pread).unwrap();
        let b = Checkpoint::open(&other, Reader::Mmap).unwrap();
        let blocks = places
            .iter()
            .rev()
            .map(|(name, rows, columns, offset, strides)| Block {
                source: operand(&a, name),
                rows: rows.clone(),
                columns: columns.clone(),
                offset: *offset,
                row_stride: strides.0,
                column_stride: strides.1,
            })
            .collect();
        let blocks = Blocks::new(&[row, plan.columns], blocks).unwrap();
        let pair = Pair { reasoning: Source::Blocks(blocks), multimodal: operand(&b, "w") };
        let found = difference(pair, numel, threads).unwrap();
        let covered: Vec<bool> = (0..row)
            .map(|row| places.iter().any(|place| place.1.contains(&row)))
            .collect();
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let exact = if covered[index / plan.columns] { expected - 0.5 } else { 0.0 };
            prop_assert_eq!(*found, exact);
        }
    }
}

#[test]
fn blocks_that_overlap_leave_gaps_or_reach_outside_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.safetensors");
    write(&path, &[("t", vec![12], (0..12).map(|i| i as f32).collect())]);
    let a = Checkpoint::open(&path, Reader::Pread).unwrap();
    let block = |rows: std::ops::Range<usize>,
                 columns: std::ops::Range<usize>,
                 offset,
                 strides: (usize, usize)| Block {
        source: operand(&a, "t"),
        rows,
        columns,
        offset,
        row_stride: strides.0,
        column_stride: strides.1,
    };
    let refused = |blocks| match Blocks::new(&[4, 3], blocks) {
        Err(Error::Argument(message)) => message,
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("accepted"),
    };
    assert!(Blocks::new(&[4, 3], vec![block(0..4, 0..3, 0, (3, 1))]).is_ok());
    assert!(Blocks::new(&[4, 3], vec![block(1..3, 0..3, 0, (3, 1))]).is_ok());
    refused(vec![]);
    let overlaps = [
        vec![block(0..4, 0..3, 0, (3, 1)), block(0..4, 0..3, 0, (3, 1))],
        vec![block(0..3, 0..3, 0, (3, 1)), block(2..4, 0..3, 0, (3, 1))],
        vec![block(0..4, 0..2, 0, (2, 1)), block(0..4, 1..3, 0, (2, 1))],
        vec![block(0..4, 0..2, 0, (2, 1))],
        vec![block(0..4, 1..3, 0, (2, 1))],
    ];
    for blocks in overlaps {
        assert!(refused(blocks).contains("overlap or leave a gap"));
    }
    let outside = [
        block(0..5, 0..3, 0, (3, 1)),
        block(0..4, 0..4, 0, (3, 1)),
        block(0..4, 0..3, 1, (3, 1)),
        block(0..4, 0..3, 0, (4, 1)),
        block(0..4, 0..3, usize::MAX, (3, 1)),
        block(0..4, 0..3, 0, (usize::MAX, 1)),
        block(0..4, 0..3, 0, (2, 2)),
        block(2..2, 0..3, 0, (3, 1)),
    ];
    for block in outside {
        let message = refused(vec![block]);
        assert!(message.contains("does not fit t"), "{message}");
    }
}

fn sparse(directory: &Path, sidecar: &str) -> std::path::PathBuf {
    let path = directory.join("a.safetensors");
    write(&path, &[("here", vec![4], vec![1.0; 4]), ("hole", vec![4], vec![0.0; 4])]);
    std::fs::write(directory.join("a.safetensors.ranges.json"), sidecar).unwrap();
    path
}

#[test]
fn what_was_not_downloaded_is_refused_and_never_read_as_zeros() {
    for reader in [Reader::Pread, Reader::Mmap] {
        let directory = tempfile::tempdir().unwrap();
        let path = sparse(directory.path(), "{}");
        let nbytes = std::fs::metadata(&path).unwrap().len();
        let text = format!(
            "{{\"format_version\":1,\"nbytes\":{nbytes},\"etag\":null,\"ranges\":[[0,{}],[{0},{}]]}}",
            nbytes - 24,
            nbytes - 16
        );
        let path = sparse(directory.path(), &text);
        let checkpoint = Checkpoint::open(&path, reader).unwrap();
        assert!(checkpoint.shards()[0].is_partial());
        let pair = |name| Pair {
            reasoning: Source::Whole(operand(&checkpoint, "here")),
            multimodal: operand(&checkpoint, name),
        };
        assert_eq!(difference(pair("here"), 4, 1).unwrap(), [0.0; 4]);
        let error = difference(pair("hole"), 4, 1).unwrap_err().to_string();
        assert!(error.contains("were not downloaded"), "{error}");
        // The digest must not depend on what happens to be there.
        let digest = checkpoint.shards()[0].fingerprint().unwrap();
        let all = format!("{{\"format_version\":1,\"nbytes\":{nbytes},\"ranges\":[[0,{nbytes}]]}}");
        let checkpoint = Checkpoint::open(&sparse(directory.path(), &all), reader).unwrap();
        assert_eq!(digest, checkpoint.shards()[0].fingerprint().unwrap());
        assert_eq!(
            difference(
                Pair {
                    reasoning: Source::Whole(operand(&checkpoint, "here")),
                    multimodal: operand(&checkpoint, "hole"),
                },
                4,
                1
            )
            .unwrap(),
            [1.0; 4]
        );
    }
}

#[test]
fn a_list_of_ranges_that_is_not_valid_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = sparse(directory.path(), "{}");
    let nbytes = std::fs::metadata(&path).unwrap().len();
    let valid =
        |ranges: &str| format!("{{\"format_version\":1,\"nbytes\":{nbytes},\"ranges\":{ranges}}}");
    for (text, word) in [
        ("{}".to_owned(), "not valid"),
        ("[".to_owned(), "not valid"),
        (valid("[[0,-1]]"), "not valid"),
        (valid("[[8,4]]"), "outside"),
        (valid("[[0,999999]]"), "outside"),
        (valid("[[8,16],[0,4]]"), "out of order"),
        (format!("{{\"format_version\":2,\"nbytes\":{nbytes},\"ranges\":[]}}"), "version 2"),
        ("{\"format_version\":1,\"nbytes\":5,\"ranges\":[]}".to_owned(), "of 5 bytes"),
    ] {
        let path = sparse(directory.path(), &text);
        let error = Checkpoint::open(&path, Reader::Pread).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains("ranges.json"), "{text}: {error}");
    }
}
