//! `tools/fuzz index`: see the module `index`.
#![no_main]

mod index;

use accel_ufs::index::{ByteRange, Header, PAGE_SIZE, Root};
use blake3::hazmat::{ChainingValue, Mode, merge_subtrees_non_root, merge_subtrees_root};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| index::run(bytes));

libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    let bytes = &mut data[..size];
    // Some keep a wrong checksum, and some wrong values: what is behind those is only
    // reached with right ones.
    if seed % 8 != 0 {
        sum(bytes);
        if seed % 4 != 0 && prove(bytes).is_some() {
            sum(bytes);
        }
    }
    size
});

/// Makes the checksum of a header, or of a start file, right.
fn sum(bytes: &mut [u8]) {
    if bytes.starts_with(b"ACCELBEG") {
        if let Some((checked, checksum)) = bytes.split_last_chunk_mut::<32>() {
            *checksum = *blake3::hash(checked).as_bytes();
        }
        return;
    }
    if let Some(page) = bytes.get_mut(..PAGE_SIZE) {
        let checksum = blake3::hash(&page[..PAGE_SIZE - 32]);
        page[PAGE_SIZE - 32..].copy_from_slice(checksum.as_bytes());
    }
}

/// Makes every value of the tree that of what is below, and the root last.
fn prove(bytes: &mut [u8]) -> Option<()> {
    let header = Header::parse(&index::page_at(bytes, 0)?).ok()?;
    let layout = *header.layout();
    // Larger ones do not fit an input.
    if layout.index_size() > bytes.len() as u64 {
        return None;
    }
    let pages: Vec<_> = layout.pages().collect();
    for page in pages.into_iter().rev() {
        let ByteRange { offset, .. } = layout.page_range(page);
        let at = usize::try_from(offset).ok()?;
        let values =
            layout.chunks().div_ceil(128u64.pow(page.level() as u32)) - page.number() * 128;
        let used = usize::try_from(values.min(128)).ok()? * 32;
        bytes[at + used..at + PAGE_SIZE].fill(0);
        let (values, _) = bytes[at..at + used].as_chunks::<32>();
        match layout.parent(page) {
            Some(parent) => {
                let place = layout.page_range(parent).offset + page.number() % 128 * 32;
                let place = usize::try_from(place).ok()?;
                let value = subtree(values);
                bytes[place..place + 32].copy_from_slice(&value);
            }
            None => {
                let (left, right) = values.split_at(split(values.len()));
                let root = merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash);
                let header = Header::new(
                    Root(*root.as_bytes()),
                    header.image_size(),
                    header.metadata(),
                );
                bytes[..PAGE_SIZE].copy_from_slice(&header.ok()?.encode());
            }
        }
    }
    Some(())
}

/// BLAKE3's value of neighbouring subtrees, all but the last full.
fn subtree(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(split(values.len()));
            merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
        }
    }
}

/// How many of `values` (two or more) are left of the node above them all.
fn split(values: usize) -> usize {
    values.next_power_of_two() / 2
}
