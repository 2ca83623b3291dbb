//! Changes tars as tars: whole entries, their types and names, and any bytes; then
//! makes the headers' checksums right, because hardly any input would get past them.

use std::ops::Range;

const BLOCK: usize = 512;
const TYPES: &[u8] = b"\x000123456 7SxgLKVMD";

/// A mutator for libFuzzer.
pub fn mutate(data: &mut [u8], size: usize, max_size: usize, seed: u32) -> usize {
    let mut random = Random(u64::from(seed) << 1 | 1);
    if size == 0 || compressed(&data[..size]) {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let size = match random.below(3) {
        0 => change_entries(data, size, max_size, &mut random),
        _ => libfuzzer_sys::fuzzer_mutate(data, size, max_size),
    };
    // Some may keep a wrong checksum.
    if random.below(16) != 0 {
        for entry in entries(&data[..size]) {
            sum(&mut data[entry.start..][..BLOCK]);
        }
    }
    size
}

fn compressed(data: &[u8]) -> bool {
    data.starts_with(b"\x1f\x8b\x08") || data.starts_with(b"\x28\xb5\x2f\xfd")
}

/// Where the entries lie, headers of extensions as entries of their own.
fn entries(data: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = 0;
    while let Some(header) = data.get(start..start + BLOCK) {
        if header.iter().all(|byte| *byte == 0) {
            break;
        }
        let mut end = start + BLOCK;
        if header[156] == b'S' && header[482] != 0 {
            while data.get(end + 504).is_some_and(|more| *more != 0) {
                end += BLOCK;
            }
            end += BLOCK;
        }
        if matches!(
            header[156],
            0 | b'0' | b'7' | b'S' | b'x' | b'g' | b'L' | b'K'
        ) {
            end = end.saturating_add(stored(header).next_multiple_of(BLOCK));
        }
        end = end.min(data.len());
        found.push(start..end);
        start = end;
    }
    found
}

fn stored(header: &[u8]) -> usize {
    let digits = header[124..136]
        .iter()
        .filter(|byte| (b'0'..=b'7').contains(byte));
    let size = digits.fold(0usize, |size, digit| size << 3 | usize::from(digit - b'0'));
    size.min(1 << 30)
}

fn sum(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn change_entries(data: &mut [u8], size: usize, max_size: usize, random: &mut Random) -> usize {
    let entries = entries(&data[..size]);
    if entries.is_empty() {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let one = entries[random.below(entries.len())].clone();
    let other = entries[random.below(entries.len())].clone();
    let field = |random: &mut Random| match random.below(4) {
        0 => 157..257,
        1 => 345..500,
        _ => 0..100,
    };
    match random.below(6) {
        // Another type.
        0 => data[one.start + 156] = TYPES[random.below(TYPES.len())],
        // One's name as the other's name or target.
        1 => {
            let name = data[other.start..][field(random)].to_vec();
            let to = field(random);
            let len = name.len().min(to.len());
            data[one.start..][to][..len].copy_from_slice(&name[..len]);
        }
        // A marker before a name.
        2 => {
            let marks: [&[u8]; 5] = [b".wh.", b".wh..wh..opq", b"../", b"./", b"/"];
            let mark = marks[random.below(marks.len())];
            let name = &mut data[one.start..][..100];
            name.copy_within(..100 - mark.len(), mark.len());
            name[..mark.len()].copy_from_slice(mark);
        }
        // One goes.
        3 => {
            data.copy_within(one.end..size, one.start);
            return size - one.len();
        }
        // One comes again, before the other.
        _ => {
            let copy = data[one].to_vec();
            if size + copy.len() > max_size {
                return size;
            }
            data.copy_within(other.start..size, other.start + copy.len());
            data[other.start..][..copy.len()].copy_from_slice(&copy);
            return size + copy.len();
        }
    }
    size
}

/// xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % limit as u64).unwrap_or(0)
    }
}
