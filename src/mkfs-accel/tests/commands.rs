//! The smaller commands: layer, verify, gc.

mod common;

use common::{Image, Ufs, bad, good, gzip, run, sample_tar};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempDir;

#[test]
fn a_layer_is_written_beside_its_index() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    let tar = sample_tar(1);
    fs::write(path("layer.tar.gz"), gzip(&tar)).unwrap();
    let arguments = |out: &str| good(&[&"layer", &path("layer.tar.gz"), &"-o", &path(out)]);
    let text = arguments("a.erofs");
    let image = fs::read(path("a.erofs")).unwrap();
    assert!(
        text.contains(blake3::hash(&image).to_hex().as_str()),
        "{text}"
    );
    assert!(
        text.contains(&accel_oci::Digest::of(&tar).to_string()),
        "{text}"
    );
    let index = fs::read(path("a.idx")).unwrap();
    let header = accel_ufs::index::Header::parse(index[..4096].try_into().unwrap()).unwrap();
    assert_eq!(header.image_size().bytes(), image.len() as u64);
    assert_eq!(header.layout().index_size(), index.len() as u64);
    // Directories and files: all of the metadata lies where the header says.
    assert!(header.metadata().length > 0);
    assert_eq!(header.metadata().end(), Some(image.len() as u64));

    // The same as on UFS.
    let ufs = Ufs::new();
    let report = ufs.convert(&Image::gzipped(&[tar]).source());
    assert_eq!(fs::read(ufs.image(&report, 0)).unwrap(), image);
    assert_eq!(
        fs::read(ufs.image(&report, 0).with_extension("idx")).unwrap(),
        index
    );

    // What is there is not touched, what fails leaves nothing.
    let error = bad(&[&"layer", &path("layer.tar.gz"), &"-o", &path("a.erofs")]);
    assert!(error.contains("a.erofs"), "{error}");
    assert_eq!(fs::read(path("a.erofs")).unwrap(), image);
    fs::write(path("bad.gz"), &gzip(&sample_tar(1))[..5000]).unwrap();
    bad(&[&"layer", &path("bad.gz"), &"-o", &path("b.erofs")]);
    assert!(!path("b.erofs").exists() && !path("b.idx").exists());
}

fn flip(path: &Path, offset: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

#[test]
fn verify_finds_every_kind_of_damage() {
    let image = Image::gzipped(&[sample_tar(1), sample_tar(2)]);
    type Damage = fn(&Path);
    let cases: [(&str, Damage); 8] = [
        ("chunk 3 of the image", |erofs| {
            flip(erofs, 3 * 131_072 + 17);
        }),
        ("is the index of another", |erofs| {
            // Another image's index is in itself good.
            let other = Ufs::new();
            let report = other.convert(&Image::gzipped(&[sample_tar(9)]).source());
            let from = other.image(&report, 0).with_extension("idx");
            fs::copy(from, erofs.with_extension("idx")).unwrap();
        }),
        ("page 0 of level 0", |erofs| {
            flip(&erofs.with_extension("idx"), 8192 + 40);
        }),
        ("zero map", |erofs| flip(&erofs.with_extension("idx"), 4096)),
        ("checksum", |erofs| flip(&erofs.with_extension("idx"), 60)),
        ("bytes instead of", |erofs| {
            let file = fs::OpenOptions::new().append(true).open(erofs).unwrap();
            file.set_len(file.metadata().unwrap().len() + 4096).unwrap();
        }),
        ("cannot read", |erofs| {
            let file = fs::OpenOptions::new().write(true).open(erofs).unwrap();
            file.set_len(4096).unwrap();
        }),
        ("cannot read", |erofs| fs::remove_file(erofs).unwrap()),
    ];
    for (said, damage) in cases {
        let ufs = Ufs::new();
        let report = ufs.convert(&image.source());
        damage(&ufs.image(&report, 1));
        let output = run(&[&"verify", &image.source(), &"--ufs", &ufs.path()]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(3), "{said}: {text}");
        assert!(text.contains(said), "{said}: {text}");
        assert!(text.contains("layer 1/2"), "{said}: {text}");
        assert_eq!(text.matches("DAMAGED, ").count(), 1, "{said}: {text}");
    }
}

#[test]
fn help_tells_the_exit_codes() {
    let text = good(&[&"--help"]);
    assert!(
        text.contains("130") && text.contains("verify found damage"),
        "{text}"
    );
}
