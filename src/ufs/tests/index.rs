//! The chunk index against plain BLAKE3, and against every kind of damage.

use accel_ufs::index::*;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// Bytes that differ from chunk to chunk, with stretches of zeros.
fn image(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = vec![0; size];
    for (page, chunk) in bytes.chunks_exact_mut(4096).zip(0u64..) {
        if (chunk / 32).wrapping_mul(seed | 1) % 5 == 3 {
            continue;
        }
        for word in page.chunks_exact_mut(8) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(99991);
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    bytes
}

/// Builds the index with the chunks in an order that `seed` decides.
fn build(image: &[u8], seed: u64) -> (Root, Vec<u8>) {
    let mut chunks: Vec<_> = (0..).map(ChunkNo).zip(image.chunks(CHUNK_SIZE)).collect();
    chunks.sort_by_key(|(no, _)| *blake3::hash(&(no.0 ^ seed).to_le_bytes()).as_bytes());
    let mut builder = IndexBuilder::new();
    for (no, bytes) in chunks {
        builder.add(no, bytes).unwrap();
    }
    builder
        .finish(image.len() as u64, ByteRange::new(0, 4096))
        .unwrap()
}

fn page(index: &[u8], range: ByteRange) -> Page {
    let at = usize::try_from(range.offset).unwrap();
    index[at..at + PAGE_SIZE].try_into().unwrap()
}

/// Reads everything as a node does, from root and size alone.
fn verify(root: Root, size: usize, image: &[u8], index: &[u8]) -> Result<(), String> {
    let header =
        Header::parse(index[..PAGE_SIZE].try_into().unwrap()).map_err(|e| e.to_string())?;
    let layout = Layout::new(ImageSize::new(size as u64).unwrap());
    if header.root() != root || *header.layout() != layout {
        return Err("header of another image".into());
    }
    for (no, bytes) in (0..).map(ChunkNo).zip(image.chunks(CHUNK_SIZE)) {
        let mut walk = layout.walk(root, no).unwrap();
        let value = loop {
            match walk.step() {
                Step::Fetch { range, .. } => walk
                    .supply(&page(index, range))
                    .map_err(|e| e.to_string())?,
                Step::Found(value) => break value,
            }
        };
        layout
            .verify_chunk(no, bytes, value)
            .map_err(|e| e.to_string())?;
    }
    Ok(())
}

#[test]
fn the_root_is_plain_blake3_at_every_boundary() {
    let chunk = CHUNK_SIZE;
    let mut sizes = vec![4096, 8192, chunk - 4096, chunk, chunk + 4096];
    for chunks in [2, 3, 127, 128, 129, 130, 255, 256, 257] {
        sizes.extend([chunks * chunk - 4096, chunks * chunk, chunks * chunk + 4096]);
    }
    for size in sizes {
        let image = image(size, size as u64);
        let (root, index) = build(&image, 7);
        assert_eq!(root.0, *blake3::hash(&image).as_bytes(), "{size} bytes");
        let layout = Layout::new(ImageSize::new(size as u64).unwrap());
        assert_eq!(index.len() as u64, layout.index_size(), "{size} bytes");
        assert_eq!(verify(root, size, &image, &index), Ok(()), "{size} bytes");
    }
}

/// Three levels need more than 128 × 128 chunks (2 GiB): the last value of level
/// 0 opens the third level. One chunk's bytes stand for all; BLAKE3 hashes the
/// rest of the stream as it would a file.
#[test]
fn three_levels_merge_to_plain_blake3() {
    let chunks = 128 * 128 + 1;
    let tail = 12288;
    let bytes = image(CHUNK_SIZE, 3);
    let mut builder = IndexBuilder::new();
    let mut plain = blake3::Hasher::new();
    for no in 0..chunks {
        let bytes = if no + 1 == chunks {
            &bytes[..tail]
        } else {
            &bytes
        };
        builder.add(ChunkNo(no), bytes).unwrap();
        plain.update(bytes);
    }
    let size = (chunks - 1) * CHUNK_SIZE as u64 + tail as u64;
    let (root, index) = builder.finish(size, ByteRange::new(0, 0)).unwrap();
    assert_eq!(root.0, *plain.finalize().as_bytes());
    let layout = Layout::new(ImageSize::new(size).unwrap());
    assert_eq!(layout.levels(), 3);
    for no in [0, 1, 127, 128, 128 * 128 - 1, 128 * 128] {
        let mut walk = layout.walk(root, ChunkNo(no)).unwrap();
        while let Step::Fetch { range, .. } = walk.step() {
            walk.supply(&page(&index, range)).unwrap();
        }
        let Step::Found(value) = walk.step() else {
            unreachable!()
        };
        let bytes = if no + 1 == chunks {
            &bytes[..tail]
        } else {
            &bytes
        };
        layout.verify_chunk(ChunkNo(no), bytes, value).unwrap();
        assert!(layout.verify_chunk(ChunkNo(no ^ 1), bytes, value).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_size_any_order_any_flipped_bit(
        pages in 1usize..6_000,
        seed in any::<u64>(),
        bit in any::<prop::sample::Index>(),
        in_image in any::<bool>(),
    ) {
        let mut image = image(pages * 4096, seed);
        let size = image.len();
        let (root, mut index) = build(&image, seed);
        prop_assert_eq!(root.0, *blake3::hash(&image).as_bytes());
        prop_assert_eq!(verify(root, size, &image, &index), Ok(()));

        let zero_map = Layout::new(ImageSize::new(size as u64).unwrap()).zero_map();
        let damaged = if in_image { &mut image } else { &mut index };
        let bit = bit.index(damaged.len() * 8);
        damaged[bit / 8] ^= 1 << (bit % 8);
        let byte = (bit / 8) as u64;
        let hint = !in_image && (zero_map.offset..zero_map.end().unwrap()).contains(&byte);
        prop_assert!(hint || verify(root, size, &image, &index).is_err(), "bit {bit}");
    }

    #[test]
    fn the_zero_map_says_which_chunks_are_zero(pages in 1usize..2000, seed in any::<u64>()) {
        let image = image(pages * 4096, seed);
        let (_, index) = build(&image, seed);
        let layout = Layout::new(ImageSize::new(image.len() as u64).unwrap());
        let start = usize::try_from(layout.zero_map().offset).unwrap();
        let map = &index[start..start + usize::try_from(layout.zero_map().length).unwrap()];
        for (no, chunk) in (0..).zip(image.chunks(CHUNK_SIZE)) {
            let zero = chunk.iter().all(|byte| *byte == 0);
            prop_assert_eq!(layout.is_zero(map, ChunkNo(no)), zero);
        }
        prop_assert!(!layout.is_zero(map, ChunkNo(layout.chunks())));
    }

    #[test]
    fn hostile_records_are_errors_or_records(
        text in "\\PC*",
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let digest = format!("sha256:{}", "0".repeat(64));
        let mut json = format!(
            r#"{{"layout":1,"manifest":"{digest}","config":"{digest}",
                "platform":{{"os":"linux","architecture":"amd64"}},"source":"oci:/x",
                "process":{{"env":[],"entrypoint":[],"cmd":["sh"],"working_dir":"/","user":""}},
                "layers":[{{"diff_id":"{digest}","chain_id":"{digest}","digest":"{digest}",
                "media_type":"x","size":1,"erofs":{{"path":"x","root":"{0}","size":4096,
                "uuid":"00000000-0000-8000-8000-000000000000","index_size":8192}}}}]}}"#,
            "7".repeat(64)
        )
        .into_bytes();
        let at = at.index(json.len());
        json[at] = byte;
        if cut {
            json.truncate(at);
        }
        for json in [text.as_bytes(), &json] {
            let _ = accel_ufs::record::ImageRecord::parse(json);
            let _ = accel_ufs::record::NameRecord::parse(json);
            let _ = accel_ufs::record::DigestRecord::parse(json);
        }
        let _ = text.parse::<accel_ufs::resolve::ImageName>();
    }

    #[test]
    fn hostile_headers_are_errors_or_consistent(
        size in any::<u64>(),
        fields in prop::collection::vec(any::<u64>(), 6),
        small in any::<bool>(),
    ) {
        let root = Root([1; 32]);
        let size = if small { (size % 1000 + 1) * 4096 } else { size };
        let valid = ImageSize::new(4096).unwrap();
        let mut page = Header::new(root, valid, ByteRange::new(0, 0)).unwrap().encode();
        page[16..24].copy_from_slice(&size.to_le_bytes());
        if !small {
            page[56..104].copy_from_slice(
                &fields.iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<_>>(),
            );
        }
        let sum = blake3::hash(&page[..4064]);
        page[4064..].copy_from_slice(sum.as_bytes());
        if let Ok(header) = Header::parse(&page) {
            prop_assert_eq!(header.image_size().bytes(), size);
            prop_assert!(header.metadata().end().unwrap() <= size);
        }
    }
}

#[test]
fn headers_say_what_is_wrong_with_them() {
    let size = ImageSize::new(1 << 20).unwrap();
    let good = Header::new(Root([1; 32]), size, ByteRange::new(4096, 8192)).unwrap();
    assert_eq!(Header::parse(&good.encode()), Ok(good));
    let change = |at: usize, byte: u8, sum: bool| {
        let mut page = good.encode();
        page[at] = byte;
        if sum {
            let sum = blake3::hash(&page[..4064]);
            page[4064..].copy_from_slice(sum.as_bytes());
        }
        Header::parse(&page).unwrap_err()
    };
    assert_eq!(change(0, 0, true), HeaderError::Magic);
    assert_eq!(change(8, 2, false), HeaderError::Layout(2));
    assert_eq!(change(30, 9, false), HeaderError::Checksum);
    assert_eq!(change(12, 16, true), HeaderError::ChunkSize(16));
    assert!(matches!(change(16, 1, true), HeaderError::Size(_)));
    assert_eq!(change(104, 1, true), HeaderError::Storage(1));
    assert_eq!(change(4000, 1, true), HeaderError::Reserved);
    for at in [62, 72, 80, 88, 96] {
        assert!(matches!(change(at, 0x77, true), HeaderError::Range { .. }));
    }
}

#[test]
fn chunks_that_make_no_image_are_refused() {
    let full = vec![1; CHUNK_SIZE];
    let none = ByteRange::new(0, 0);
    let mut builder = IndexBuilder::new();
    for bad in [
        &full[..0],
        &full[..100],
        &[full.as_slice(), &[0; 4096]].concat(),
    ] {
        assert!(matches!(
            builder.add(ChunkNo(0), bad),
            Err(BuildError::ChunkLength { .. })
        ));
    }
    assert!(matches!(
        builder.add(ChunkNo(1 << 27), &full),
        Err(BuildError::PastEnd { .. })
    ));
    builder.add(ChunkNo(1), &full).unwrap();
    assert!(matches!(
        builder.add(ChunkNo(1), &full),
        Err(BuildError::Repeated { .. })
    ));
    let finish = |chunks: &[(u64, usize)], size: u64| {
        let mut builder = IndexBuilder::new();
        for (no, length) in chunks {
            builder.add(ChunkNo(*no), &full[..*length])?;
        }
        builder.finish(size, none).map(|_| ())
    };
    let chunk = CHUNK_SIZE as u64;
    type Case<'a> = (&'a [(u64, usize)], u64, fn(&BuildError) -> bool);
    let cases: [Case; 7] = [
        (&[(1, CHUNK_SIZE)], 2 * chunk, |e| {
            matches!(e, BuildError::Missing { .. })
        }),
        (&[(0, CHUNK_SIZE)], 2 * chunk, |e| {
            matches!(e, BuildError::Missing { .. })
        }),
        (&[], 4096, |e| matches!(e, BuildError::Missing { .. })),
        (&[], 0, |e| matches!(e, BuildError::Size(_))),
        (&[(0, CHUNK_SIZE), (1, CHUNK_SIZE)], chunk, |e| {
            matches!(e, BuildError::Misfit { .. })
        }),
        (&[(0, CHUNK_SIZE)], chunk - 4096, |e| {
            matches!(e, BuildError::Misfit { .. })
        }),
        (&[(0, 4096), (1, CHUNK_SIZE)], 2 * chunk, |e| {
            matches!(e, BuildError::Misfit { .. })
        }),
    ];
    for (chunks, size, wanted) in cases {
        let error = finish(chunks, size).unwrap_err();
        assert!(wanted(&error), "{chunks:?} of {size}: {error}");
    }
}

/// The bytes of layout 1 never change: what was published stays readable.
#[test]
fn layout_1_is_frozen() {
    let image = image(40 * CHUNK_SIZE + 4096, 1);
    let (_, index) = build(&image, 0);
    assert_eq!(
        blake3::hash(&index).to_hex().as_str(),
        "431248b1b822799d0d73c2e6a7b0b457fb14041b7baae05f810f7c4ffb5214df"
    );
}

/// Whoever can write to UFS can make chunk and index agree. The root they
/// cannot change, so the page is refused before its values are used.
#[test]
fn a_chunk_forged_together_with_its_index_is_refused_at_the_page() {
    for chunks in [2, 129] {
        let size = chunks * CHUNK_SIZE;
        let good = image(size, 5);
        let (root, index) = build(&good, 5);
        let mut bad = good.clone();
        bad[size - 1] ^= 1;
        let (other, forged) = build(&bad, 5);
        assert_ne!(root, other);
        let layout = Layout::new(ImageSize::new(size as u64).unwrap());
        let last = ChunkNo(layout.chunks() - 1);

        // Every page forged: the top one does not merge to the root.
        let mut walk = layout.walk(root, last).unwrap();
        let Step::Fetch {
            page: top, range, ..
        } = walk.step()
        else {
            panic!("no page is asked for");
        };
        let error = walk.supply(&page(&forged, range)).unwrap_err();
        assert!(matches!(error, Mismatch::Page { page, .. } if page == top));
        // The walk stays where it was and takes the right page.
        walk.supply(&page(&index, range)).unwrap();

        // Only the pages below forged: they do not merge to the value above.
        while let Step::Fetch {
            page: asked, range, ..
        } = walk.step()
        {
            let error = walk.supply(&page(&forged, range)).unwrap_err();
            assert!(matches!(error, Mismatch::Page { page, .. } if page == asked));
            walk.supply(&page(&index, range)).unwrap();
        }
        let Step::Found(value) = walk.step() else {
            unreachable!()
        };
        let bytes = |image: &[u8]| image[size - CHUNK_SIZE..].to_vec();
        layout.verify_chunk(last, &bytes(&good), value).unwrap();
        let error = layout.verify_chunk(last, &bytes(&bad), value).unwrap_err();
        assert!(matches!(error, Mismatch::Chunk { chunk, .. } if chunk == last));
    }
}

#[test]
fn every_value_and_all_padding_of_every_page_is_checked() {
    let (root, index) = build(&image(200 * CHUNK_SIZE, 6), 6);
    let layout = Layout::new(ImageSize::new(200 * CHUNK_SIZE as u64).unwrap());
    for tree_page in layout.pages() {
        let good = page(&index, layout.page_range(tree_page));
        let expected = match layout.parent(tree_page) {
            None => layout.top_page(root).unwrap().1,
            Some(parent) => layout.page_value(&page(&index, layout.page_range(parent)), tree_page),
        };
        layout.verify_page(tree_page, &good, expected).unwrap();
        for byte in (0..PAGE_SIZE).step_by(31) {
            let mut bad = good;
            bad[byte] ^= 0x40;
            assert!(
                layout.verify_page(tree_page, &bad, expected).is_err(),
                "{tree_page}, {byte}"
            );
        }
    }
}
