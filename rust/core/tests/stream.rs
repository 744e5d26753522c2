//! The same bits whatever the threads, the memory, the reader and the way of writing, in no more
//! memory than was allowed.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use drift_fast_core::align::compose::{Block, Blocks};
use drift_fast_core::align::pair::{Pair, Source};
use drift_fast_core::checkpoint::Checkpoint;
use drift_fast_core::checkpoint::Operand;
use drift_fast_core::kernel::{self, Elements};
use drift_fast_core::output::{OutputSpec, Slot, Storage};
use drift_fast_core::stream::{
    CHUNK, Detail, Difference, Found, Landed, Memory, Options, Outcome, Part, Sink,
    load_differences, run,
};
use drift_fast_core::{Dtype, Error, Moments, Reader, Writer};

/// Two sides of float32 tensors of many shapes; `w` is stored transposed in `a`, after one element.
const SHAPES: [(&str, &[usize]); 9] = [
    ("scalar", &[]),
    ("empty", &[0, 7]),
    ("one", &[1]),
    ("odd", &[333, 17]),
    ("chunk", &[CHUNK]),
    ("more", &[CHUNK + 1]),
    ("less", &[511, 513]),
    ("huge", &[1201, 1021]),
    ("last", &[3, 1, 2]),
];
const ROWS: usize = 1700;
const COLUMNS: usize = 701;

fn values(seed: u64, numel: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..numel)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}

fn write(path: &Path, seed: u64, transposed: bool) {
    let mut entries = Vec::new();
    let mut data: Vec<u8> = Vec::new();
    let mut add = |name: &str, shape: &[usize], values: &[f32]| {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        entries.push(format!(
            "{name:?}:{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{start},{}]}}",
            data.len()
        ));
    };
    for (number, (name, shape)) in SHAPES.iter().enumerate() {
        add(name, shape, &values(seed + number as u64, shape.iter().product()));
    }
    let extra = usize::from(transposed);
    let numel = ROWS * COLUMNS + extra;
    add(
        "w",
        &if transposed { vec![numel] } else { vec![ROWS, COLUMNS] },
        &values(seed + 99, numel),
    );
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        write(&directory.path().join("a.safetensors"), 1, true);
        write(&directory.path().join("b.safetensors"), 1000, false);
        Self { directory }
    }

    fn open(&self, reader: Reader) -> (Checkpoint, Checkpoint) {
        let open = |name| Checkpoint::open(&self.directory.path().join(name), reader).unwrap();
        (open("a.safetensors"), open("b.safetensors"))
    }

    fn target(&self) -> PathBuf {
        self.directory.path().join("delta")
    }
}

fn operand<'a>(checkpoint: &'a Checkpoint, name: &str) -> Operand<'a> {
    let (shard, tensor) = checkpoint.tensor(name).unwrap();
    Operand { shard, tensor, scales: None }
}

fn pairs<'a>(a: &'a Checkpoint, b: &'a Checkpoint, with_blocks: bool) -> Vec<Pair<'a>> {
    let mut pairs: Vec<Pair<'a>> = SHAPES
        .iter()
        .map(|(name, _)| Pair {
            reasoning: Source::Whole(operand(a, name)),
            multimodal: operand(b, name),
        })
        .collect();
    if with_blocks {
        // The first 100 rows are not stored; the others are, transposed, in two blocks.
        let block = |columns: std::ops::Range<usize>, offset| Block {
            source: operand(a, "w"),
            rows: 100..ROWS,
            columns,
            offset,
            row_stride: 1,
            column_stride: ROWS - 100,
        };
        let second = 1 + 300 * (ROWS - 100);
        let blocks = vec![block(0..300, 1), block(300..COLUMNS, second)];
        pairs.push(Pair {
            reasoning: Source::Blocks(Blocks::new(&[ROWS, COLUMNS], blocks).unwrap()),
            multimodal: operand(b, "w"),
        });
    }
    pairs
}

fn stream(
    pairs: &[Pair<'_>],
    sink: Sink<'_>,
    options: &Options,
) -> drift_fast_core::Result<Outcome> {
    run(pairs, sink, options, &mut |_| ControlFlow::Continue(()))
}

/// Moments, peak, and the bytes of every file of the delta.
fn written(files: &Files, reader: Reader, options: &Options) -> (Outcome, Vec<Vec<u8>>) {
    let (a, b) = files.open(reader);
    let pairs = pairs(&a, &b, true);
    let storage = Storage::Plain(Dtype::F32);
    let slots: Vec<Slot> = pairs
        .iter()
        .flat_map(|pair| {
            let tensor = pair.multimodal.tensor;
            storage.slots(tensor.name.clone(), tensor.shape.clone())
        })
        .collect();
    let target = files.target();
    let spec = OutputSpec {
        target: &target,
        slots: &slots,
        max_shard_nbytes: 3 << 20,
        description_nbytes: 0,
        overwrite: true,
    };
    let writer = Writer::create(&spec, storage).unwrap();
    let outcome = stream(&pairs, Sink::Files(&writer), options).unwrap();
    writer.commit("{}").unwrap();
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    (outcome, paths.iter().map(|path| std::fs::read(path).unwrap()).collect())
}

fn bits(moments: &[Moments]) -> Vec<[u64; 5]> {
    moments
        .iter()
        .map(|m| {
            [m.delta_sq, m.written_sq, m.reasoning_sq, m.multimodal_sq, m.dot].map(f64::to_bits)
        })
        .collect()
}

#[test]
fn neither_threads_nor_memory_nor_reader_changes_a_bit() {
    let files = Files::new();
    let (first, expected) = written(&files, Reader::Pread, &Options::new(1));
    assert!(expected.len() > 4, "several shards, an index and a description");
    // One worker needs some 13 MiB for the tensor of blocks.
    for threads in 1..=8 {
        for (number, memory) in [14 << 20, 40 << 20, usize::MAX].into_iter().enumerate() {
            let reader = [Reader::Pread, Reader::Mmap][(threads + number) % 2];
            let prefetch_nbytes = [0, 1 << 20, 32 << 20][(threads + number / 2) % 3];
            let options = Options { threads, memory, prefetch_nbytes };
            let (outcome, found) = written(&files, reader, &options);
            assert_eq!(bits(&outcome.moments), bits(&first.moments), "{options:?} {reader:?}");
            assert!(found == expected, "{options:?} {reader:?}");
            assert!(outcome.peak_nbytes <= memory, "{} {options:?}", outcome.peak_nbytes);
        }
    }
}

#[test]
fn a_pair_s_sums_are_those_of_its_chunks_in_order() {
    let files = Files::new();
    let (a, b) = files.open(Reader::Pread);
    let pairs = pairs(&a, &b, false);
    let found = stream(&pairs, Sink::None, &Options::new(4)).unwrap().moments;
    for (number, (name, shape)) in SHAPES.iter().enumerate() {
        let numel: usize = shape.iter().product();
        let bytes = |seed| -> Vec<u8> {
            values(seed + number as u64, numel).iter().flat_map(|v| v.to_le_bytes()).collect()
        };
        let (left, right) = (bytes(1), bytes(1000));
        let mut expected = Moments::default();
        for (x, y) in left.chunks(CHUNK * 4).zip(right.chunks(CHUNK * 4)) {
            let elements = |bytes| Elements::new(Dtype::F32, bytes).unwrap();
            expected.add(&kernel::subtract(elements(x), elements(y), None));
        }
        assert_eq!(bits(&[found[number]]), bits(&[expected]), "{name}");
    }
}

/// What is loaded of some elements of every pair, through a ring of so many bytes or directly.
fn loaded(
    wanted: &[Difference<'_>],
    ring: Option<usize>,
    threads: usize,
) -> (Vec<Vec<u8>>, Vec<u64>) {
    let mut found: Vec<Vec<u8>> =
        wanted.iter().map(|one| vec![0xff; one.elements.len() * 4]).collect();
    let mut memory = vec![0xff; ring.unwrap_or(0)];
    // Copied while the call lasts, as a device does, hence by the address.
    let address = memory.as_ptr();
    let (mut calls, mut copies) = (0, Vec::new());
    let mut landed = |parts: &[Part]| {
        for part in parts {
            let nbytes = part.elements.len() * 4;
            if ring.is_some() {
                // SAFETY: the core fills no part of a ring that landed until it is freed.
                #[allow(unsafe_code)]
                let bytes = unsafe { std::slice::from_raw_parts(address.add(part.offset), nbytes) }
                    .to_vec();
                copies.push((part.clone(), bytes));
            }
        }
        calls += 1;
        ControlFlow::Continue(calls)
    };
    let options = Options::new(threads);
    let memory = match ring {
        Some(_) => Memory::Ring(&mut memory),
        None => Memory::Each(found.iter_mut().map(Vec::as_mut_slice).collect()),
    };
    let sums = load_differences(wanted, Dtype::F32, memory, &options, Detail::Faults, &mut landed)
        .unwrap();
    for (part, bytes) in copies {
        found[part.run][part.elements.start * 4..part.elements.end * 4].copy_from_slice(&bytes);
    }
    (found, sums.iter().map(|one| one.square.to_bits()).collect())
}

#[test]
fn what_is_loaded_is_what_the_files_have_with_its_squares_whatever_the_memory_and_the_threads() {
    let files = Files::new();
    let (a, b) = files.open(Reader::Pread);
    let (_, shards) = written(&files, Reader::Pread, &Options::new(1));
    let all: Vec<_> = pairs(&a, &b, true)
        .into_iter()
        .map(|pair| Difference { elements: 0..pair.multimodal.tensor.numel(), pair })
        .collect();
    let (bytes, squares) = loaded(&all, None, 1);
    for (bytes, square) in bytes.iter().zip(&squares) {
        assert!(
            bytes.is_empty() || shards.iter().any(|s| s.windows(bytes.len()).any(|w| w == bytes))
        );
        let mut expected = 0.0;
        for chunk in bytes.chunks(CHUNK * 4) {
            let chunk = Elements::new(Dtype::F32, chunk).unwrap();
            expected += kernel::subtract(chunk, chunk, None).reasoning_sq;
        }
        assert_eq!(f64::from_bits(*square), expected);
    }
    for ring in [None, Some(4 << 20), Some(40 << 20)] {
        assert_eq!(loaded(&all, ring, 3), (bytes.clone(), squares.clone()));
    }
    // Runs that begin and end anywhere, also inside rows that are put together from blocks.
    let some: Vec<_> = pairs(&a, &b, true)
        .into_iter()
        .map(|pair| {
            let numel = pair.multimodal.tensor.numel();
            Difference { elements: numel / 3..numel - numel / 5, pair }
        })
        .collect();
    for ring in [None, Some(5 << 20)] {
        let (parts, _) = loaded(&some, ring, 2);
        for ((part, one), whole) in parts.iter().zip(&some).zip(&bytes) {
            assert_eq!(part, &whole[one.elements.start * 4..one.elements.end * 4]);
        }
    }
}

/// Pieces that have nothing to tell are subtracted alone; the others are counted as if all were.
#[test]
fn faults_are_found_where_moments_are_not_wanted() {
    let files = Files::new();
    for (name, nbytes, value) in [("a", 4 * 100_000, f32::NAN), ("b", 4 * CHUNK, f32::INFINITY)] {
        let path = files.directory.path().join(format!("{name}.safetensors"));
        let mut bytes = std::fs::read(&path).unwrap();
        let place = bytes.len() - nbytes;
        bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    }
    let (a, b) = files.open(Reader::Pread);
    let wanted: Vec<_> = pairs(&a, &b, true)
        .into_iter()
        // Whole tensors under other names: the one that the reasoning model has transposed.
        .chain([Pair { reasoning: Source::Whole(operand(&b, "w")), multimodal: operand(&b, "w") }])
        .map(|pair| Difference { elements: 0..pair.multimodal.tensor.numel(), pair })
        .collect();
    let found = |detail| {
        let mut bytes: Vec<Vec<u8>> =
            wanted.iter().map(|one| vec![0; one.elements.len() * 4]).collect();
        let memory = Memory::Each(bytes.iter_mut().map(Vec::as_mut_slice).collect());
        let landed: Landed<'_> = &mut |_| ControlFlow::Continue(0);
        let options = Options::new(2);
        let found = load_differences(&wanted, Dtype::F32, memory, &options, detail, landed);
        let counts: Vec<_> = found
            .unwrap()
            .iter()
            .map(|Found { square, moments }| {
                let faults = (moments.nonfinite_reasoning, moments.nonfinite_multimodal);
                assert_eq!(square.is_finite(), faults == (0, 0));
                (faults, moments.delta_sq > 0.0)
            })
            .collect();
        (bytes, counts)
    };
    let ((few, faults), (all, moments)) = (found(Detail::Faults), found(Detail::Moments));
    assert_eq!(few, all);
    let of = |found: &[((u64, u64), bool)]| found.iter().map(|one| one.0).collect::<Vec<_>>();
    assert_eq!(of(&faults), of(&moments));
    let count = wanted.len();
    assert_eq!(of(&faults)[count - 2..], [(1, 1), (1, 1)]);
    // What has no fault has no sums, unless they are wanted.
    assert!(moments[4].1 && !faults[4].1 && faults[count - 2].1);
}

#[test]
fn memory_that_one_worker_does_not_fit_in_is_refused_with_the_least_that_will_do() {
    let files = Files::new();
    let (a, b) = files.open(Reader::Pread);
    let mut least = Vec::new();
    for with_blocks in [false, true] {
        let pairs = pairs(&a, &b, with_blocks);
        let options = |memory| Options { memory, ..Options::new(8) };
        let Err(Error::Argument(message)) = stream(&pairs, Sink::None, &options(1)) else {
            panic!("accepted one byte");
        };
        let needed: usize =
            message.split_once("memory=").unwrap().1.split_once(' ').unwrap().0.parse().unwrap();
        assert!(
            message.contains(if with_blocks { "of which w " } else { "of which chunk " }),
            "{message}"
        );
        assert!(stream(&pairs, Sink::None, &options(needed - 1)).is_err());
        let outcome = stream(&pairs, Sink::None, &options(needed)).unwrap();
        assert_eq!(outcome.peak_nbytes, needed);
        least.push(needed);
    }
    // One chunk of either side in float32 and the sums of those that wait, against the longer chunks
    // of a tensor of blocks.
    assert!((2 << 20..(2 << 20) + 8192).contains(&least[0]), "{least:?}");
    assert!(least[1] > 3 * least[0], "{least:?}");
}

#[test]
fn more_threads_than_fit_are_not_started() {
    let files = Files::new();
    let (a, b) = files.open(Reader::Pread);
    let pairs = pairs(&a, &b, false);
    let peak = |threads, memory| {
        let options = Options { memory, ..Options::new(threads) };
        stream(&pairs, Sink::None, &options).unwrap().peak_nbytes
    };
    // Workers start one by one and the first may have done everything, so a peak is a bound.
    assert!(peak(8, 5 << 20) <= 5 << 20);
    assert!(peak(1, usize::MAX) < 3 << 20);
}
