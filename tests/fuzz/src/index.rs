//! Arbitrary bytes as what a node reads from UFS before it trusts anything: a chunk
//! index, a start file, or a record where they begin like JSON. Errors are fine; what is taken lies
//! within the image and the index, and says one thing only.

use accel_ufs::index::{ChunkNo, Header, Layout, PAGE_SIZE, Page, Root, Step};
use accel_ufs::record::{DigestRecord, ImageRecord, NameRecord};

/// The most chunks of an image whose proofs are followed.
const MAX_WALKS: u64 = 32;

/// Runs one input.
#[allow(dead_code)] // the mutator needs the rest alone
pub fn run(bytes: &[u8]) {
    if bytes.first() == Some(&b'{') {
        return records(bytes);
    }
    let _ = accel_ufs::start::parse(bytes);
    let Some(page) = page_at(bytes, 0) else {
        return;
    };
    let Ok(header) = Header::parse(&page) else {
        return;
    };
    assert_eq!(header.encode(), page, "a header has one form");
    let (layout, size) = (header.layout(), header.image_size().bytes());
    assert!(header.metadata().end().is_some_and(|end| end <= size));
    let tree = layout.tree();
    assert_eq!(Some(layout.index_size()), tree.end());
    for level in 0..layout.levels() {
        for chunk in [0, layout.chunks() / 2, layout.chunks() - 1] {
            let page = layout.page(level, ChunkNo(chunk)).expect("a page of it");
            let range = layout.page_range(page);
            assert!(range.offset >= tree.offset && range.end() <= tree.end());
        }
    }
    let map = part(bytes, layout.zero_map().offset, layout.zero_map().length);
    // As many at the beginning as at the end, and the first one that is none.
    let last = layout.chunks();
    let first = (0..last.min(MAX_WALKS)).chain(last.saturating_sub(MAX_WALKS)..=last);
    for chunk in first.map(ChunkNo) {
        let proved = follow(bytes, layout, header.root(), chunk);
        assert!(!proved || chunk.0 < last);
        let zero = layout.is_zero(map.unwrap_or_default(), chunk);
        assert!(!zero || chunk.0 / 8 < layout.zero_map().length);
    }
}

/// Goes from the root to the value of a chunk; whether it got there.
fn follow(bytes: &[u8], layout: &Layout, root: Root, chunk: ChunkNo) -> bool {
    let Ok(mut walk) = layout.walk(root, chunk) else {
        return false;
    };
    loop {
        match walk.step() {
            Step::Fetch { range, .. } => {
                let Some(page) = page_at(bytes, range.offset) else {
                    return false;
                };
                if walk.supply(&page).is_err() {
                    assert!(
                        matches!(walk.step(), Step::Fetch { range: same, .. } if same == range)
                    );
                    return false;
                }
            }
            Step::Found(value) => {
                let range = layout.chunk_range(chunk).expect("a chunk of the image");
                // Nobody has bytes for a value that an input made up.
                let length = usize::try_from(range.length).expect("at most 128 KiB");
                if layout.levels() == 1 && chunk.0 == 0 {
                    assert!(layout.verify_chunk(chunk, &vec![1; length], value).is_err());
                }
                assert!(layout.verify_chunk(chunk, &[], value).is_err());
                return true;
            }
        }
    }
}

fn records(json: &[u8]) {
    // What is read is written the same way, whatever it was.
    if let Ok(record) = ImageRecord::parse(json) {
        assert_eq!(ImageRecord::parse(&record.to_json()).ok(), Some(record));
    }
    if let Ok(record) = NameRecord::parse(json) {
        assert_eq!(NameRecord::parse(&record.to_json()).ok(), Some(record));
    }
    if let Ok(record) = DigestRecord::parse(json) {
        assert_eq!(DigestRecord::parse(&record.to_json()).ok(), Some(record));
    }
    if let Ok(text) = str::from_utf8(json) {
        let _ = text.parse::<accel_ufs::resolve::ImageName>();
    }
}

fn part(bytes: &[u8], offset: u64, length: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(length).ok()?)?)
}

/// The page at `offset`, if the bytes hold all of it.
pub fn page_at(bytes: &[u8], offset: u64) -> Option<Page> {
    part(bytes, offset, PAGE_SIZE as u64)?.try_into().ok()
}
