//! The smaller commands: layer, verify, gc.

mod common;

use common::{Image, Ufs, bad, good, gzip, mkfs_accel, run, sample_tar};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
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
    let (_, table) = text.split_once("Exit codes:\n").expect("a table");
    let told: BTreeMap<u8, &str> = table
        .lines()
        .map_while(|line| line.strip_prefix("  "))
        .map(|line| {
            let (code, meaning) = line.split_once(' ').expect("a code and what it means");
            (code.parse().expect("a number"), meaning.trim())
        })
        .collect();
    assert!(told.values().all(|meaning| !meaning.is_empty()), "{table}");
    // What the source has, and what wrong usage ends with, which is not ours.
    let source = include_str!("../src/exit.rs").lines();
    let constant = |line: &str| {
        let (_, value) = line.strip_prefix("pub const ")?.split_once(": u8 = ")?;
        Some(value.strip_suffix(';')?.parse().unwrap())
    };
    let mut codes: BTreeSet<u8> = source.filter_map(constant).collect();
    assert_eq!(codes.len(), 7);
    codes.insert(u8::try_from(code(&[&"--no-such-option"])).unwrap());
    assert_eq!(told.into_keys().collect::<BTreeSet<u8>>(), codes);
}

/// What a command line writes to its terminal.
fn on_a_terminal(words: &str) -> String {
    let output = Command::new("script")
        .args(["--quiet", "--return", "--command", words, "/dev/null"])
        .env("TERM", "xterm")
        .env("COLUMNS", "200")
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("script: {error}; apt-get install bsdutils"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn bars_are_for_terminals_only() {
    let tar = common::Tar::new()
        .file("noise", &common::noise(5, 24 << 20))
        .finish();
    let image = Image::gzipped(&[tar, sample_tar(1)]);
    let program = env!("CARGO_BIN_EXE_mkfs-accel");
    let convert = |ufs: &Ufs, more: &str| {
        let (source, ufs) = (image.source(), ufs.path().display());
        format!("{program} convert {source} --ufs {ufs} {more}")
    };
    let shown = on_a_terminal(&convert(&Ufs::new(), ""));
    // One for the layer and one for all, with how much of what, the rate and the time left.
    let bar = |label: &str| {
        shown.match_indices(label).any(|(at, _)| {
            let text = shown[at..].split(" left").next().unwrap_or_default();
            text.contains("iB  ") && text.contains(" of ") && text.contains("B/s  ")
        })
    };
    assert!(bar("in all") && bar("layer 1/2"), "{shown:?}");
    let cursor_up = "\u{1b}[1A";
    assert!(shown.contains(cursor_up), "{shown:?}");
    // In the end there are only lines.
    let last = shown.lines().last().unwrap_or_default();
    assert!(last.contains("image sha256:"), "{shown:?}");

    // Programs get no bars, also on a terminal.
    let json = on_a_terminal(&convert(&Ufs::new(), "--json"));
    let report: serde_json::Value = serde_json::from_str(&json).expect(&json);
    assert_eq!(report["layers"].as_array().map(Vec::len), Some(2));

    // And elsewhere there are plain lines.
    let output = run(&[&"convert", &image.source(), &"--ufs", &Ufs::new().path()]);
    assert_eq!(output.stderr, b"", "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains(['\r', '\u{1b}']), "{text:?}");
    for said in ["layer 1/2 ", "layer 2/2 ", "image sha256:"] {
        let lines = text.lines().filter(|line| line.starts_with(said));
        assert_eq!(lines.count(), 1, "{said}: {text}");
    }
}

/// The code that a command ends with.
fn code(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> i32 {
    run(arguments).status.code().unwrap()
}

#[test]
fn exit_codes_tell_what_kind_of_thing_failed() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    let image = Image::gzipped(&[sample_tar(1)]);
    let ufs = Ufs::new();
    let convert = |source: &str, ufs: &Path| code(&[&"convert", &source, &"--ufs", &ufs]);
    assert_eq!(convert(&image.source(), ufs.path()), 0);
    assert_eq!(convert("nonsense", ufs.path()), 2);
    assert_eq!(convert("oci:/nonexistent", ufs.path()), 4);
    assert_eq!(convert("docker://127.0.0.1:1/x", ufs.path()), 4);
    assert_eq!(convert(&image.source(), &path("missing")), 5);
    let mut broken = Image::gzipped(&[sample_tar(2)]);
    flip(&broken.blob_path(&broken.layer(0)), 5000);
    assert_eq!(convert(&broken.source(), ufs.path()), 3);
    broken.config["os"] = "plan9".into();
    broken.write();
    assert_eq!(convert(&broken.source(), ufs.path()), 4);
    assert_eq!(
        code(&[&"inspect", &broken.source(), &"--ufs", &ufs.path()]),
        4
    );
    let layer = |file: &str, out: &str| code(&[&"layer", &path(file), &"-o", &path(out)]);
    fs::write(path("good.tar"), sample_tar(1)).unwrap();
    fs::write(path("bad.tar"), [b'x'; 1024]).unwrap();
    assert_eq!(layer("good.tar", "a.erofs"), 0);
    assert_eq!(layer("good.tar", "a.erofs"), 5);
    assert_eq!(layer("bad.tar", "b.erofs"), 3);
    assert_eq!(layer("none.tar", "b.erofs"), 4);
}

#[test]
fn exit_codes_are_the_same_where_nothing_can_be_said() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let ufs = Ufs::new();
    let code = |source: &str| {
        let full = fs::OpenOptions::new().write(true).open("/dev/full");
        let status = mkfs_accel()
            .args(["convert", source, "--json", "--ufs"])
            .arg(ufs.path())
            .env("RUST_LOG", "trace")
            .stdout(Stdio::null())
            .stderr(full.unwrap())
            .status();
        status.unwrap().code()
    };
    assert_eq!(code(&image.source()), Some(0));
    assert_eq!(code("oci:/nonexistent"), Some(4));
}

#[test]
fn inspect_shows_what_a_container_sees() {
    let below = common::Tar::new()
        .directory("a/", 0o755)
        .file("a/gone", b"1")
        .file("a/kept", &common::noise(1, 300_000))
        .directory("b/", 0o755)
        .file("b/hidden", b"2")
        .file("c", b"3")
        .finish();
    let above = common::Tar::new()
        .directory("a/", 0o1777)
        .file("a/.wh.gone", b"")
        .directory("b/", 0o750)
        .file("b/.wh..wh..opq", b"")
        .file("b/new", b"4444")
        .directory("c/", 0o755)
        .file("c/below a file", b"5")
        .finish();
    let ufs = Ufs::new();
    let source = Image::gzipped(&[below, above]);
    let report = ufs.convert(&source.source());
    let inspect = |more: &[&str]| {
        let fixed = ["inspect", &source.source(), "--json"].map(str::to_owned);
        let output = common::mkfs_accel()
            .args(fixed)
            .args(more)
            .arg("--ufs")
            .arg(ufs.path())
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{error}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let paths = |files: &serde_json::Value| {
        let files = files.as_array().unwrap().iter();
        files
            .map(|file| format!("{} {}", file["layer"], file["path"].as_str().unwrap()))
            .collect::<Vec<_>>()
    };
    let seen = [
        "2 /",
        "2 /a",
        "1 /a/kept",
        "2 /b",
        "2 /b/new",
        "2 /c",
        "2 /c/below a file",
    ];
    assert_eq!(paths(&inspect(&["--tree"])), seen);
    let second = inspect(&["--tree", "--layer", "2"]);
    assert!(paths(&second).contains(&"2 /a/gone".to_owned()));
    let kinds = second.as_array().unwrap().iter().map(|file| &file["kind"]);
    assert_eq!(kinds.filter(|kind| *kind == "whiteout").count(), 1);

    // The bytes are where it says.
    let file = inspect(&["--path", "/a/kept"]);
    assert_eq!(
        (&file["layer"], &file["size"]),
        (&1.into(), &300_000.into())
    );
    let image = fs::read(ufs.image(&report, 0)).unwrap();
    let number = |name: &str| usize::try_from(file["data"][name].as_u64().unwrap()).unwrap();
    let bytes = &image[number("offset")..][..number("length")];
    assert!(bytes == common::noise(1, 300_000));
    assert_eq!(number("offset") % 131_072, 0);
    let lines = |more: &[&dyn AsRef<std::ffi::OsStr>]| {
        let ufs = ufs.path();
        let source = source.source();
        let fixed: [&dyn AsRef<std::ffi::OsStr>; 4] = [&"inspect", &source, &"--ufs", &ufs];
        good(&[&fixed[..], more].concat())
    };
    let text = lines(&[&"--path", &"a/kept"]);
    assert!(
        text.contains("layer     1 of 2") && text.contains("chunks"),
        "{text}"
    );
    let text = lines(&[&"--tree"]);
    assert!(
        text.contains("drwxrwxrwt") && text.contains("/b/new"),
        "{text}"
    );
    assert!(!text.contains("gone") && !text.contains("hidden"), "{text}");
    for gone in ["/a/gone", "/b/hidden", "/nowhere"] {
        let error = bad(&[
            &"inspect",
            &source.source(),
            &"--path",
            &gone,
            &"--ufs",
            &ufs.path(),
        ]);
        assert!(error.contains(gone), "{error}");
    }
}

/// The bytes are as their index says, but no tree.
#[test]
fn verify_reads_the_tree() {
    let image = Image::gzipped(&[sample_tar(1)]);
    let ufs = Ufs::new();
    let report = ufs.convert(&image.source());
    let verify = || run(&[&"verify", &image.source(), &"--json", &"--ufs", &ufs.path()]);
    let json = |output: &std::process::Output| {
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let output = verify();
    assert_eq!(json(&output)["layers"][0]["files"], 7);
    // Cut the tree's root out and write index and record anew.
    let path = ufs.image(&report, 0);
    let mut bytes = fs::read(&path).unwrap();
    let header = fs::read(path.with_extension("idx")).unwrap();
    let header = accel_ufs::index::Header::parse(header[..4096].try_into().unwrap()).unwrap();
    let start = usize::try_from(header.metadata().offset).unwrap();
    bytes[start + 32..start + 96].fill(0xff);
    let mut builder = accel_ufs::index::IndexBuilder::new();
    for (number, chunk) in (0..).zip(bytes.chunks(131_072)) {
        let chunk = accel_ufs::index::HashedChunk::new(accel_ufs::index::ChunkNo(number), chunk);
        builder.insert(chunk.unwrap()).unwrap();
    }
    let (root, index) = builder
        .finish(bytes.len() as u64, header.metadata())
        .unwrap();
    fs::write(&path, &bytes).unwrap();
    fs::write(path.with_extension("idx"), index).unwrap();
    let hex = report["manifest"].as_str().unwrap().replace("sha256:", "");
    let record = ufs.path().join(format!("images/sha256/{hex}.json"));
    let text = fs::read_to_string(&record).unwrap();
    let old = report["layers"][0]["erofs"]["root"].as_str().unwrap();
    fs::write(&record, text.replace(old, &root.to_string())).unwrap();
    let output = verify();
    assert_eq!(output.status.code(), Some(3));
    let found = json(&output)["layers"][0]["damage"][0].to_string();
    assert!(
        found.contains("the tree is not what EROFS should be"),
        "{found}"
    );
}

#[test]
fn json_comes_from_every_command_that_has_something_to_tell() {
    let directory = TempDir::new().unwrap();
    let tar = directory.path().join("a.tar");
    fs::write(&tar, sample_tar(1)).unwrap();
    let out = directory.path().join("a.erofs");
    let text = good(&[&"layer", &tar, &"-o", &out, &"--json"]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let root = blake3::hash(&fs::read(&out).unwrap());
    assert_eq!(report["root"], root.to_hex().as_str());
    assert_eq!(
        report["diff_id"],
        accel_oci::Digest::of(&sample_tar(1)).to_string()
    );
    let ufs = Ufs::new();
    let image = Image::gzipped(&[sample_tar(1)]);
    let manifest = ufs.convert(&image.source())["manifest"].clone();
    let list = good(&[&"list", &"--json", &"--ufs", &ufs.path()]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list[0]["manifest"], manifest);
}

#[test]
fn completions_and_manual_pages_are_written() {
    for shell in ["bash", "zsh", "fish"] {
        let text = good(&[&"completions", &shell]);
        assert!(text.contains("password-stdin"), "{shell}");
    }
    let directory = TempDir::new().unwrap();
    good(&[&"man", &directory.path()]);
    let page = fs::read_to_string(directory.path().join("mkfs-accel-convert.1")).unwrap();
    assert!(page.contains("jobs"), "{page}");
    let page = fs::read_to_string(directory.path().join("mkfs-accel.1")).unwrap();
    assert!(page.contains("Exit codes"), "{page}");
    assert_eq!(code(&[&"man", &"/nonexistent/x"]), 1);
}
