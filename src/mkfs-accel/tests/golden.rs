//! What the program writes, byte for byte: image and index of layout 1, whatever
//! the layer's compression and however many are converted at a time.

mod common;

use common::{GZIP, Image, PLAIN, Tar, Ufs, ZSTD, good, gzip, noise, sample_tar, zstd};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use tempfile::TempDir;

/// More chunks than a page of the index has values, some of them zeros.
fn large_tar() -> Vec<u8> {
    Tar::new()
        .directory("data/", 0o755)
        .file("data/first", &noise(1, 9 << 20))
        .file("data/zeros", &vec![0; 3 << 20])
        .file("data/second", &noise(2, 6 << 20))
        .file("data/small", &noise(3, 777))
        .finish()
}

#[test]
fn layout_1_gives_these_files() {
    let directory = TempDir::new().unwrap();
    let tar = large_tar();
    for (name, blob) in [
        ("plain", tar.clone()),
        ("gzip", gzip(&tar)),
        ("zstd", zstd(&tar)),
    ] {
        let input = directory.path().join(name);
        let output = directory.path().join(format!("{name}.erofs"));
        fs::write(&input, blob).unwrap();
        good(&[&"layer", &input, &"-o", &output]);
        let hash = |path: PathBuf| blake3::hash(&fs::read(path).unwrap()).to_hex().to_string();
        assert_eq!(
            hash(output.clone()),
            "79420dc26bb4d8d1a2dc7d3daffcb99ea098f177bbe3aa8927c3080a37408844",
            "{name}"
        );
        assert_eq!(
            hash(output.with_extension("idx")),
            "72465b507bc5b3aba98696067759ccbe9d83491025b15f8d006dadc7ef8945e5",
            "{name}"
        );
    }
}

#[test]
fn how_many_are_converted_at_a_time_does_not_matter() {
    let tars = [sample_tar(1), large_tar(), sample_tar(2), sample_tar(3)];
    let layers = [
        (&tars[0][..], &gzip(&tars[0])[..], GZIP),
        (&tars[1], &tars[1], PLAIN),
        (&tars[2], &zstd(&tars[2]), ZSTD),
        (&tars[3], &gzip(&tars[3]), GZIP),
    ];
    let image = Image::new(&layers);
    let convert = |jobs: &str| -> BTreeMap<PathBuf, Vec<u8>> {
        let ufs = Ufs::new();
        good(&[
            &"convert",
            &image.source(),
            &"--ufs",
            &ufs.path(),
            &"--jobs",
            &jobs,
        ]);
        ufs.layers()
    };
    let one = convert("1");
    assert_eq!(one.len(), 3 * tars.len());
    for jobs in ["2", "4"] {
        assert_eq!(convert(jobs), one, "--jobs {jobs}");
    }
}
