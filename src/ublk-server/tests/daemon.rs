//! The whole daemon over FUSE on this machine: serve, mount, read, damage, unmount.
//! Needs root, FUSE, overlayfs, EROFS and Debian's mkfs.erofs.

mod common;

use common::node::{
    Node, PROGRAM, await_that, base, big, check_big, drop_caches, field, kill, serve, serve_with,
};
use common::{Entry, Stalled, name_index, publish_image, publish_tree};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

#[test]
fn an_image_is_mounted_read_and_unmounted() {
    let mut made = None;
    let node = Node::start(|ufs| {
        let (base, files) = base(ufs);
        let top: &[Entry<'_>] = &[("etc/name", Some(b"top\n")), ("etc/more", Some(b"x"))];
        let top = publish_tree(ufs, "top", top);
        let both = publish_image(ufs, &[base, top]);
        let only = publish_image(ufs, &[base]);
        made = Some((both, name_index(ufs, only), files));
    });
    let (both, only, files) = made.unwrap();
    let (one, two) = (node.directory("one"), node.directory("two"));
    node.ask(&["mount", &both.to_string(), &one]);
    node.ask(&["mount", &only.to_string(), &two]);
    drop_caches();
    for (path, content) in &files {
        for root in [&one, &two] {
            assert!(
                fs::read(Path::new(root).join(path)).unwrap() == *content,
                "{root}/{path}"
            );
        }
    }
    let name = |root: &str| fs::read_to_string(Path::new(root).join("etc/name")).unwrap();
    assert_eq!(
        (name(&one).as_str(), name(&two).as_str()),
        ("top\n", "base\n")
    );
    let error = fs::write(Path::new(&one).join("etc/name"), "x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert!(node.ask(&["list"]).contains(&one));
    let status = node.status();
    assert_eq!(status["transport"], "fuse");
    assert_eq!(
        status["exports"].as_array().unwrap().len(),
        2,
        "the base is shared"
    );
    assert!(status["exports"][0]["trust"] == "ufs" && status["fetched_bytes"].as_u64() > Some(0));
    // The same directory twice, and a busy one.
    assert!(
        node.refused(&["mount", &both.to_string(), &one])
            .contains(&one)
    );
    let held = File::open(Path::new(&one).join("etc/name")).unwrap();
    assert!(node.refused(&["unmount", &one]).contains("in use"));
    drop(held);
    node.ask(&["unmount", &one]);
    drop_caches();
    assert_eq!(name(&two), "base\n");
    node.ask(&["unmount", &two]);
    assert!(node.refused(&["unmount", &two]).contains(&two));
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
    node.stop();
}

#[test]
fn changes_go_to_the_upper_directory() {
    let mut image = None;
    let node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    let image = image.unwrap().to_string();
    let (root, upper) = (node.directory("root"), node.path("up,per:dir"));
    let upper = upper.to_str().unwrap();
    node.ask(&["mount", &image, &root, "--rw", upper]);
    fs::write(Path::new(&root).join("etc/name"), "mine\n").unwrap();
    fs::remove_file(Path::new(&root).join("data/1")).unwrap();
    node.ask(&["unmount", &root]);
    let changed = Path::new(upper).join("upper/etc/name");
    assert_eq!(fs::read_to_string(changed).unwrap(), "mine\n");
    node.ask(&["mount", &image, &root, "--rw", upper]);
    assert_eq!(
        fs::read_to_string(Path::new(&root).join("etc/name")).unwrap(),
        "mine\n"
    );
    assert!(!Path::new(&root).join("data/1").exists());
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn an_attached_layer_is_a_file_with_its_bytes() {
    let mut layer = None;
    let node = Node::start(|ufs| layer = Some(base(ufs).0));
    let layer = layer.unwrap();
    let digest = layer.name.digest().to_string();
    for _ in 0..2 {
        let path = node.ask(&["attach", &digest]);
        let expected = fs::read(layer.name.image().beneath(&node.path("ufs"))).unwrap();
        assert!(fs::read(path.trim()).unwrap() == expected);
        assert_eq!(node.ask(&["attach", &digest]), path, "attached once");
        node.ask(&["detach", &digest]);
        assert!(!Path::new(path.trim()).exists());
    }
    assert!(node.refused(&["detach", &digest]).contains(&digest));
    node.stop();
}

#[test]
fn damage_is_an_error_where_it_is_touched_and_heals() {
    let mut made = None;
    let node = Node::start(|ufs| {
        let (layer, files) = base(ufs);
        made = Some((publish_image(ufs, &[layer]), layer, files));
    });
    let (image, layer, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image.to_string(), &root]);
    let (path, content) = files.last().unwrap();
    let file = layer.name.image().beneath(&node.path("ufs"));
    let stored = fs::read(&file).unwrap();
    let start = stored
        .windows(64)
        .position(|window| *window == content[..64])
        .unwrap();
    // In the middle of the file: its neighbours share no chunk with it.
    let at = start + content.len() / 2;
    let patch = |byte: u8| {
        let file = File::options().write(true).open(&file).unwrap();
        file.write_all_at(&[byte], at as u64).unwrap();
    };
    drop_caches();
    patch(stored[at] ^ 0x10);
    let victim = File::open(Path::new(&root).join(path)).unwrap();
    let mut byte = [0];
    let error = victim
        .read_exact_at(&mut byte, (at - start) as u64)
        .unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    let mut first = vec![0; 4096];
    victim.read_exact_at(&mut first, 0).unwrap();
    assert!(first == content[..4096]);
    for (path, content) in &files[..files.len() - 1] {
        assert!(
            fs::read(Path::new(&root).join(path)).unwrap() == *content,
            "{path}"
        );
    }
    let log = fs::read_to_string(node.path("log")).unwrap();
    for part in ["ERROR", &layer.name.to_string(), ".erofs", "UFS"] {
        assert!(log.contains(part), "{part} is not in {log}");
    }
    patch(stored[at]);
    assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
    // The second half of the image is gone, for a while. A new daemon has none of
    // it in its cache.
    drop(victim);
    node.ask(&["unmount", &root]);
    let node = node.restart();
    node.ask(&["mount", &image.to_string(), &root]);
    let victim = File::open(Path::new(&root).join(path)).unwrap();
    let short = File::options().write(true).open(&file).unwrap();
    short.set_len(at as u64).unwrap();
    drop_caches();
    victim.read_exact_at(&mut first, 0).unwrap();
    assert!(first == content[..4096]);
    assert!(
        victim
            .read_exact_at(&mut byte, (at - start) as u64 + 300_000)
            .is_err()
    );
    fs::write(&file, &stored).unwrap();
    assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
    drop(victim);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn readers_do_not_notice_killed_workers() {
    let mut made = None;
    let node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    drop_caches();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // A worker is killed once it has read something, and not more than 20
            // are: on a slow machine the reader would hardly get anywhere.
            let (mut reads, mut kills) = (0, 0);
            while !over.load(Relaxed) && kills < 20 {
                let source = &node.status()["sources"][0];
                let now = source["reads"].as_u64().unwrap();
                if let Some(pid) = source["worker"].as_i64()
                    && now > reads
                {
                    (reads, kills) = (now, kills + 1);
                    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
                    // It may have been replaced meanwhile.
                    let _ = kill_process(pid, Signal::KILL);
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        for (number, content) in (1..).zip(&files) {
            let path = Path::new(&root).join(format!("f{number}"));
            assert!(fs::read(path).unwrap() == *content);
        }
        over.store(true, Relaxed);
    });
    let workers = node.status()["sources"][0]["workers"].as_u64().unwrap();
    assert!(workers > 1, "no worker was killed");
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn more_layers_than_an_option_string_holds() {
    let mut image = None;
    let node = Node::start(|ufs| {
        let layers: Vec<_> = (0..180)
            .map(|number| {
                let (name, text) = (format!("file{number}"), number.to_string());
                let entries: [Entry<'_>; 2] =
                    [(&name, Some(b"x")), ("last", Some(text.as_bytes()))];
                publish_tree(ufs, &name, &entries)
            })
            .collect();
        image = Some(publish_image(ufs, &layers));
    });
    let root = node.directory("root");
    node.ask(&["mount", &image.unwrap().to_string(), &root]);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 181);
    assert_eq!(
        fs::read_to_string(Path::new(&root).join("last")).unwrap(),
        "179"
    );
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn a_second_daemon_is_refused_and_a_dead_ones_mounts_can_be_taken_back() {
    let mut image = None;
    let mut node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    let image = image.unwrap().to_string();
    let second = Command::new(PROGRAM)
        .arg("serve")
        .arg("--ufs")
        .arg(node.path("ufs"))
        .arg("--socket")
        .arg(node.path("socket"))
        .output()
        .unwrap();
    assert!(!second.status.success());
    let message = String::from_utf8(second.stderr).unwrap();
    assert!(
        message.contains(node.path("socket").to_str().unwrap()),
        "{message}"
    );
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    assert!(node.client(&["unmount", &root]).status.success());
    assert_eq!(node.mounts(), [""; 0]);
    // The dead daemon's socket and lock are in nobody's way.
    node.child = serve(node.directory.path());
    node.await_daemon();
    node.ask(&["mount", &image, &root]);
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn a_client_that_died_before_it_noted_anything_can_be_taken_back() {
    let mut images = Vec::new();
    let node = Node::start(|ufs| {
        let layer = base(ufs).0;
        images.push(publish_image(ufs, &[layer]));
        let other = publish_tree(ufs, "other", &[("file", Some(b"other"))]);
        images.push(publish_image(ufs, &[layer, other]));
    });
    let root = node.directory("root");
    let mut stream = UnixStream::connect(node.path("socket")).unwrap();
    let attach = serde_json::json!({
        "op": "attach", "image": images[0].to_string(), "holder": root
    });
    writeln!(stream, "{attach}").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("{\"ok\""), "{answer}");
    let other = images[1].to_string();
    let message = node.refused(&["mount", &other, &root]);
    assert!(message.contains("already holds"), "{message}");
    node.ask(&["unmount", &root]);
    node.ask(&["mount", &other, &root]);
    node.ask(&["unmount", &root]);
    node.refused(&["unmount", &root]);
    node.stop();
}

#[test]
fn wrong_usage_says_what_is_wrong() {
    let mut image = None;
    let node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    let root = node.directory("root");
    let unknown = format!("sha256:{}", "0".repeat(64));
    for (words, parts) in [
        (
            &["mount", &unknown, &root][..],
            &[unknown.as_str(), "mkfs-accel convert"][..],
        ),
        (&["mount", "oci:/none:x", &root], &["oci:/none:x"]),
        (&["mount", "nonsense", &root], &["nonsense"]),
        (
            &["mount", &image.unwrap().to_string(), "/none/such"],
            &["/none/such"],
        ),
        (&["unmount", "/"], &["no image is mounted at /"]),
    ] {
        let message = node.refused(words);
        for part in parts {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    node.stop();
}

#[test]
fn a_stalled_ufs_is_not_noticed_but_told() {
    let stalled = Stalled::new();
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let (layer, files) = base(ufs);
        made = Some((publish_image(ufs, &[layer]).to_string(), files));
    });
    let (image, files) = made.unwrap();
    node.stall_ufs(&stalled);
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    drop_caches();
    for (path, content) in &files {
        assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
    }
    // Others are asked before its time is over.
    await_that(|| node.status()["sources"][0]["in_use"] == false);
    let status = node.status();
    assert_eq!(status["sources"][1]["in_use"], true, "{status}");
    assert_eq!(status["failed_reads"], 0);
    let words = node.ask(&["status"]);
    for part in ["set aside", "does not answer", "no answer", "asked again"] {
        assert!(words.contains(part), "{part}: {words}");
    }
    node.ask(&["unmount", &root]);
    node.stop();
}

/// The threads of this name that a process has, as directories in /proc.
fn threads(process: u32, name: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let tasks = tasks.map(|task| task.unwrap().file_name().into_string().unwrap());
    let tasks = tasks.map(|task| format!("{process}/task/{task}"));
    // One may have ended since.
    let name = format!("{name}\n");
    let has_it = |task: &String| {
        fs::read_to_string(format!("/proc/{task}/comm")).is_ok_and(|comm| comm == name)
    };
    tasks.filter(has_it).collect()
}

/// A worker that its source holds in the kernel ends when that answers: until then nobody
/// looks again and again whether it has.
#[test]
fn a_stuck_worker_is_waited_for_asleep() {
    let stalled = Stalled::new();
    let mut image = None;
    let mut node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    node.stall_ufs(&stalled);
    let root = node.directory("root");
    node.ask(&["mount", &image.unwrap().to_string(), &root]);
    await_that(|| node.status()["sources"][0]["dying"] != 0);
    let threads = threads(node.child.id(), "source");
    assert_eq!(threads.len(), 2, "one for each source");
    let slept = |thread: &str| -> u64 {
        let times = field(thread, "voluntary_ctxt_switches");
        times.parse().unwrap()
    };
    let before: Vec<_> = threads.iter().map(|thread| slept(thread)).collect();
    // While a hundred looks would fit in.
    std::thread::sleep(std::time::Duration::from_secs(1));
    for (thread, before) in threads.iter().zip(before) {
        let times = slept(thread) - before;
        assert!(times < 50, "it has looked {times} times");
    }
    assert_ne!(node.status()["sources"][0]["dying"], 0, "it is gone");
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn a_killed_daemon_is_not_noticed() {
    let mut made = None;
    let mut node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    node.ask(&["mount", &image, &root]);
    check_big(&root, &files);
    for _ in 0..3 {
        // Reads that are surely under way: what they wait for does not come.
        kill(&node.status()["sources"][0]["worker"], Signal::STOP);
        let missed = |node: &Node| node.status()["exports"][0]["misses"].as_u64().unwrap();
        let before = missed(&node);
        std::thread::scope(|scope| {
            scope.spawn(|| check_big(&root, &files));
            scope.spawn(|| check_big(&root, &files[..3]));
            while missed(&node) == before {
                std::thread::yield_now();
            }
            node.child.kill().unwrap();
            node.child.wait().unwrap();
            node.child = serve(node.directory.path());
            // While that starts, and after it.
            check_big(&root, &files[..1]);
        });
        assert_eq!(node.status()["exports"][0]["errors"], 0);
        assert_eq!(node.status()["failed_reads"], 0);
    }
    // And in an orderly way.
    let over = AtomicBool::new(false);
    let node = std::thread::scope(|scope| {
        let (over, root, files) = (&over, &root, &files);
        let reader = scope.spawn(move || {
            while !over.load(Relaxed) {
                check_big(root, files);
            }
        });
        let node = node.restart().restart();
        over.store(true, Relaxed);
        reader.join().unwrap();
        node
    });
    node.ask(&["unmount", &root]);
    node.stop();
}

#[test]
fn a_killed_keeper_is_replaced_and_the_last_connection_ends_it() {
    let mut made = None;
    let mut node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    assert!(node.status()["keeper"].is_null());
    node.ask(&["mount", &image, &root]);
    for _ in 0..3 {
        let keeper = node.status()["keeper"].clone();
        kill(&keeper, Signal::KILL);
        check_big(&root, &files[..1]);
        while node.status()["keeper"] == keeper {
            std::thread::yield_now();
        }
    }
    node.kill_and_restart();
    check_big(&root, &files);
    let keeper = node.status()["keeper"].clone();
    assert!(keeper.is_i64(), "the next daemon has no keeper");
    node.ask(&["unmount", &root]);
    assert!(!Path::new(&format!("/proc/{keeper}/fd/0")).exists());
    assert!(node.status()["keeper"].is_null());
    // Without a daemon, unmounting is what ends it.
    node.ask(&["mount", &image, &root]);
    let keeper = node.status()["keeper"].clone();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    node.ask(&["unmount", &root]);
    while Path::new(&format!("/proc/{keeper}/fd/0")).exists() {
        std::thread::yield_now();
    }
    node.child = serve(node.directory.path());
    node.await_daemon();
    assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
    node.stop();
}

#[test]
fn with_daemon_and_keeper_dead_an_image_can_be_mounted_anew() {
    let mut made = None;
    let mut node = Node::start(|ufs| made = Some(big(ufs)));
    let (image, files) = made.unwrap();
    let (root, other) = (node.directory("root"), node.directory("other"));
    node.ask(&["mount", &image, &root]);
    let held = File::open(Path::new(&root).join("f1")).unwrap();
    let keeper = node.status()["keeper"].clone();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    kill(&keeper, Signal::KILL);
    node.child = serve(node.directory.path());
    node.await_daemon();
    node.ask(&["mount", &image, &other]);
    check_big(&other, &files);
    drop(held);
    node.ask(&["unmount", &root]);
    check_big(&other, &files);
    node.ask(&["unmount", &other]);
    node.stop();
}

#[test]
fn a_kill_while_mounting_or_unmounting_leaves_a_mount_or_none() {
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let (base, files) = base(ufs);
        let top: &[Entry<'_>] = &[("etc/name", Some(b"top\n"))];
        let top = publish_tree(ufs, "top", top);
        made = Some((publish_image(ufs, &[base, top]).to_string(), files));
    });
    let (image, files) = made.unwrap();
    let root = node.directory("root");
    let (mut mounted, mut not) = (0, 0);
    for delay in 0..12 {
        let words = if delay % 3 == 2 { "unmount" } else { "mount" };
        if words == "unmount" {
            node.ask(&["mount", &image, &root]);
        }
        let mut client = Command::new(PROGRAM);
        client.arg(words);
        if words == "mount" {
            client.arg(&image);
        }
        client.arg(&root).arg("--socket").arg(node.path("socket"));
        client.stdin(Stdio::null()).stderr(Stdio::null());
        let mut client = client.spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay * 8));
        node.child.kill().unwrap();
        node.child.wait().unwrap();
        if delay % 2 == 0 {
            let _ = client.kill();
        }
        node.child = serve(node.directory.path());
        client.wait().unwrap();
        node.await_daemon();
        // It is there, and right, or can be made so.
        let there = Path::new(&root).join("etc/name").exists();
        if there {
            for (path, content) in &files {
                assert!(fs::read(Path::new(&root).join(path)).unwrap() == *content);
            }
            mounted += 1;
            node.ask(&["unmount", &root]);
        } else {
            // Half a mount is taken back, or there is none.
            node.client(&["unmount", &root]);
            not += 1;
        }
        assert_eq!(node.mounts(), [""; 0], "{words}, {delay}");
        assert_eq!(node.status()["exports"].as_array().unwrap().len(), 0);
        node.ask(&["mount", &image, &root]);
        node.ask(&["unmount", &root]);
    }
    println!("{mounted} were mounted, {not} were not");
    node.stop();
}

/// Mounts `from` at `to`.
fn bind(from: &Path, to: &Path) {
    rustix::mount::mount_bind(from, to).unwrap();
}

#[test]
fn a_ufs_that_is_mounted_late_or_anew_is_seen() {
    let mut made = None;
    let node = Node::start(|ufs| {
        let ready = ufs.parent().unwrap().join("ready");
        fs::create_dir(&ready).unwrap();
        made = Some(big(&ready));
    });
    let (image, files) = made.unwrap();
    let (root, ufs) = (node.directory("root"), node.path("ufs"));
    assert!(node.refused(&["mount", &image, &root]).contains("convert"));
    bind(&node.path("ready"), &ufs);
    // It was looked for less than a second ago.
    while !node.client(&["mount", &image, &root]).status.success() {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    check_big(&root, &files[..1]);
    // What is there now goes away; the same is mounted from elsewhere, later.
    rustix::mount::unmount(&ufs, rustix::mount::UnmountFlags::DETACH).unwrap();
    let moved = node.path("moved");
    fs::rename(node.path("ready"), &moved).unwrap();
    fs::create_dir(node.path("copy")).unwrap();
    let copied = Command::new("cp")
        .arg("-a")
        .args([moved.join("."), node.path("copy")])
        .status();
    assert!(copied.unwrap().success());
    fs::remove_dir_all(&moved).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| check_big(&root, &files));
        bind(&node.path("copy"), &ufs);
    });
    assert_eq!(node.status()["failed_reads"], 0);
    node.ask(&["unmount", &root]);
    rustix::mount::unmount(&ufs, rustix::mount::UnmountFlags::DETACH).unwrap();
    node.stop();
}

#[test]
fn who_waits_for_a_stalled_ufs_holds_up_nobody_else() {
    let mut made = None;
    let mut node = Node::start(|ufs| {
        let (layer, _) = base(ufs);
        let other = publish_tree(ufs, "other", &[("file", Some(b"other"))]);
        made = Some(
            [[layer].as_slice(), &[other], &[layer, other]].map(|layers| {
                let image = publish_image(ufs, layers);
                image.to_string()
            }),
        );
    });
    let [one, two, three] = made.unwrap();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    // Nothing is given up while this test lasts.
    let further: [&OsStr; 2] = ["--attempt-timeout".as_ref(), "10m".as_ref()];
    node.child = serve_with(node.directory.path(), &further);
    node.await_daemon();
    let (first, second) = (node.directory("first"), node.directory("second"));
    node.ask(&["mount", &one, &first]);
    node.ask(&["mount", &two, &second]);
    let worker = node.status()["sources"][0]["worker"].clone();
    kill(&worker, Signal::STOP);
    std::thread::scope(|scope| {
        let third = node.directory("third");
        let (node, three) = (&node, &three);
        let waiting = scope.spawn(move || node.ask(&["mount", three, &third]));
        // While that waits: everything that needs nothing of UFS.
        node.ask(&["list"]);
        node.ask(&["unmount", &first]);
        node.ask(&["unmount", &second]);
        assert!(!waiting.is_finished(), "it did not wait for UFS");
        kill(&worker, Signal::CONT);
        waiting.join().unwrap();
    });
    let third = node.directory("third");
    let name = fs::read_to_string(Path::new(&third).join("file")).unwrap();
    assert_eq!(name, "other");
    // Nor does it hold up the end.
    kill(&worker, Signal::STOP);
    let mut client = Command::new(PROGRAM);
    client.args(["mount", &one, &first, "--socket"]);
    client.arg(node.path("socket")).stderr(Stdio::null());
    let mut client = client.spawn().unwrap();
    node.ask(&["unmount", &third]);
    node.stop();
    assert!(!client.wait().unwrap().success());
}

/// Of what is read ahead for an image nothing is waited for when the image goes.
#[test]
fn metadata_on_its_way_does_not_hold_up_the_unmount() {
    let mut image = None;
    let mut node = Node::start(|ufs| image = Some(publish_image(ufs, &[base(ufs).0])));
    let image = image.unwrap().to_string();
    node.child.kill().unwrap();
    node.child.wait().unwrap();
    // Nothing is given up while this test lasts.
    let further: [&OsStr; 2] = ["--attempt-timeout".as_ref(), "10m".as_ref()];
    node.child = serve_with(node.directory.path(), &further);
    node.await_daemon();
    let root = node.directory("root");
    let say = |command: serde_json::Value| {
        let mut stream = UnixStream::connect(node.path("socket")).unwrap();
        writeln!(stream, "{command}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("{\"ok\""), "{answer}");
    };
    // As `mount` does before and after it mounts; in between UFS goes away.
    say(serde_json::json!({"op": "attach", "image": image, "holder": root}));
    let worker = node.status()["sources"][0]["worker"].clone();
    kill(&worker, Signal::STOP);
    say(serde_json::json!({"op": "mounted", "holder": root}));
    await_that(|| node.status()["exports"][0]["misses"] != 0);
    node.ask(&["unmount", &root]);
    let status = node.status();
    for list in ["exports", "holders"] {
        assert_eq!(status[list], serde_json::json!([]), "{status}");
    }
    assert_eq!(status["sources"][0]["worker"], worker);
    kill(&worker, Signal::CONT);
    node.stop();
}

/// Memory may be too short for the stack of a thread.
#[test]
fn clients_ask_again_while_no_thread_can_be_made() {
    let node = Node::start(|ufs| {
        base(ufs);
    });
    let daemon = node.processes()[0];
    let number = |name: &str| -> u64 {
        let text = field(&daemon.to_string(), name);
        text.trim_end_matches(" kB").trim().parse().unwrap()
    };
    // Stacks of threads that have ended are kept and used again; these clients have them all.
    let idle: Vec<_> = (0..64)
        .map(|_| UnixStream::connect(node.path("socket")).unwrap())
        .collect();
    await_that(|| threads(daemon, "admin").len() >= 64);
    let limit = |current| {
        let pid = Pid::from_raw(i32::try_from(daemon).unwrap());
        let maximum = getrlimit(Resource::As).maximum;
        prlimit(pid, Resource::As, Rlimit { current, maximum }).unwrap();
    };
    // Half a stack is left, for everything else.
    limit(Some((number("VmSize") << 10) + (1 << 20)));
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| node.status());
        await_that(|| node.log().contains("which is to ask again"));
        limit(None);
        assert_eq!(asked.join().unwrap()["transport"], "fuse");
    });
    drop(idle);
}
