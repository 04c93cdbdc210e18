//! Synthetic recordings through the whole report.

use std::fs;

use clap::{Args, FromArgMatches};

use crate::compare::{Comparison, Metric, Pair, Verdict};
use crate::record::{Ceiling, Environment, Latency, MapTime, Recording, Run};
use crate::report::{ReportArgs, report_to};

/// A stretch of numbers in `-1.0..1.0` that looks random and is the same every time.
fn jitter(seed: &mut u64) -> f64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as f64 / f64::from(1u32 << 30) - 1.0
}

fn speed(mode: &str) -> f64 {
    match mode {
        "cdev" => 1.03,
        "noiommu" => 1.08,
        _ => 1.0,
    }
}

fn run(nic: &str, mode: &str, pair: &str, round: u32, seed: &mut u64) -> Run {
    let base = match nic {
        "virtio-net" => 612e3,
        "e1000" => 154e3,
        _ => 208e3,
    };
    let mut about = |x: f64, share: f64| x * (1.0 + share * jitter(seed));
    let p50 = about(4.1e10 / base / speed(mode), 0.02) as u64;
    let iommu = !mode.starts_with("noiommu");
    let (cdev, sent) = (mode.ends_with("cdev"), about(200e3, 0.1) as u64);
    let lost = if round == 3 && nic == "e1000" { 17 } else { 0 };
    let open_ms = about(if cdev { 103.0 } else { 108.0 }, 0.03);
    let map_ms = if iommu { about(2.9, 0.05) } else { 0.0 };
    Run {
        nic: nic.into(),
        mode: mode.into(),
        round,
        pair: pair.into(),
        forward_pps: about(base * speed(mode), 0.008),
        latency_ns: Latency {
            p50,
            p99: about(p50 as f64 * 1.9, 0.05) as u64,
            p999: about(p50 as f64 * 4.2, 0.15) as u64,
            max: about(p50 as f64 * 30.0, 0.4) as u64,
            count: sent - lost,
        },
        open_ms,
        bind_ms: if cdev { about(0.21, 0.1) } else { 0.0 },
        attach_ms: if iommu { about(if cdev { 0.34 } else { 1.9 }, 0.05) } else { 0.0 },
        start_map_ms: map_ms / 4.0,
        map_ms,
        map_bytes: if iommu { 256 << 20 } else { 0 },
        map_ioctls: u64::from(iommu),
        unmap_ms: map_ms * 0.7,
        first_packet_ms: open_ms + map_ms / 4.0 + about(14.0, 0.1),
        sent,
        received: sent - lost,
        doorbells: (sent - lost) / 4,
        drops: [("rx_missed".to_owned(), lost), ("tx_full".to_owned(), 0)].into(),
    }
}

/// One boot: every NIC in every mode, interleaved over `rounds`, after as many A/A rounds.
fn recording(modes: &[&str], rounds: u32) -> Recording {
    let mut seed = modes.len() as u64;
    let (mut runs, mut maps) = (Vec::new(), Vec::new());
    for nic in ["virtio-net", "e1000", "e1000e"] {
        for round in 0..rounds {
            runs.extend((0..2).map(|_| run(nic, modes[0], Run::NOISE, round, &mut seed)));
        }
        for round in 0..rounds {
            let there_and_back = modes.iter().chain(modes.iter().rev());
            runs.extend(there_and_back.map(|mode| run(nic, mode, "modes", round, &mut seed)));
        }
    }
    for mode in modes.iter().filter(|mode| !mode.starts_with("noiommu")) {
        for (memory, cost) in [("4 KiB", 17.5), ("2 MiB", 1.7)] {
            for call in ["map", "map-file"].iter().filter(|c| **c == "map" || *mode == "cdev") {
                for round in 0..rounds {
                    let file = if *call == "map" { 1.0 } else { 0.6 };
                    let map_ms = cost * file * (1.0 + 0.05 * jitter(&mut seed));
                    let (memory, call) = (memory.to_owned(), (*call).to_owned());
                    let mode = (*mode).to_owned();
                    let (bytes, unmap_ms) = (1 << 30, map_ms * 1.4);
                    maps.push(MapTime {
                        mode,
                        memory,
                        call,
                        bytes,
                        round,
                        map_ms,
                        map_ioctl_ms: map_ms / 1.001,
                        unmap_ms,
                        map_ioctls: 1,
                        unmap_ioctls: 1,
                    });
                }
            }
        }
    }
    let facts = [
        ("vireo", "0.1.0 (5c1f0e2)"),
        ("date", "2026-11-24T10:12:44Z"),
        ("kernel", "6.12.57+deb13-amd64"),
        ("cpu", "AMD EPYC 7B13"),
        ("cpus", "2"),
        ("accelerator", "KVM (QEMU 7.2.22)"),
        ("hugepages", "512 × 2 MiB"),
        ("iommu", if modes[0].starts_with("noiommu") { "none" } else { "Intel VT-d (QEMU), caching mode" }),
        ("command", "./scripts/lab compare --yes --json compare.json --html <compare>.html"),
    ];
    let environment = Environment(facts.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    let ceiling = |nic: &str| Ceiling { nic: nic.to_owned(), pps: 2e6 };
    let ceilings = ["virtio-net", "e1000", "e1000e"].map(ceiling).to_vec();
    Recording { environment, runs, maps, ceilings }
}

fn boots() -> Vec<Recording> {
    vec![recording(&["container", "cdev", "compat"], 8), recording(&["noiommu", "noiommu-cdev"], 8)]
}

fn pair<'a>(comparison: &'a Comparison, nic: &str, modes: [&str; 2], metric: Metric) -> &'a Pair {
    let fits = |p: &&Pair| p.nic == nic && [&*p.baseline, &*p.mode] == modes && p.metric == metric;
    comparison.pairs.iter().find(fits).unwrap()
}

#[test]
fn the_ceiling_is_beside_what_was_forwarded() {
    let comparison = Comparison::of(&boots());
    let of: Vec<_> = comparison.null_forwarder.iter().map(|row| (row.nic.as_str(), row.boot)).collect();
    let nics = ["virtio-net", "e1000", "e1000e"];
    assert_eq!(of, nics.map(|nic| [(nic, 1), (nic, 2)]).concat());
    let said = crate::table::text(&comparison, false);
    assert!(said.contains("Null forwarder"), "{said}");
    assert!(said.contains("2.00 to 2.00"), "{said}");
    assert!(said.contains(" 1.0010 "), "{said}");
}

#[test]
fn rows_hold_medians_and_sums_in_the_order_of_the_tables() {
    let boots = boots();
    let comparison = Comparison::of(&boots);
    let names: Vec<_> = comparison.rows.iter().map(|r| (&*r.nic, &*r.label)).collect();
    assert_eq!(
        names[..5],
        ["container", "cdev", "compat", "noiommu", "noiommu-cdev"].map(|m| ("virtio-net", m))
    );
    assert_eq!((names.len(), names[5], names[10]), (15, ("e1000", "container"), ("e1000e", "container")));
    let of_row = |r: &&Run| r.nic == "e1000" && r.mode == "container" && r.pair != Run::NOISE;
    let sent: u64 = boots[0].runs.iter().filter(of_row).map(|r| r.sent).sum();
    let row = &comparison.rows[5];
    assert_eq!((row.sent, row.dropped, row.received, row.rounds), (sent, 34, sent - 34, 16));
    assert_eq!(row.drops["rx_missed"], 34);
    assert!((row.forward_pps / 154e3 - 1.0).abs() < 0.01 && row.balanced, "{row:?}");
    assert!((row.map_ms_per_gib - 16.0 * row.start_map_ms).abs() < 1e-9 && row.map_ioctls == 1, "{row:?}");
    assert_eq!(comparison.rows[3].map_ms_per_gib, 0.0);
    assert!(comparison.problems.is_empty());
}

#[test]
fn a_difference_beyond_the_noise_is_said_and_quantified() {
    let comparison = Comparison::of(&boots());
    let p = pair(&comparison, "virtio-net", ["container", "cdev"], Metric::ForwardPps);
    assert_eq!((p.verdict, p.pairs), (Verdict::Differs, 16));
    assert!(p.ratio.low > 1.02 && p.ratio.high < 1.04, "{p:?}");
    assert!(
        p.sentence.starts_with("virtio-net: cdev forwards 2.")
            && p.sentence.contains(" % faster than container (95 % interval 2."),
        "{}",
        p.sentence
    );
    let attach = pair(&comparison, "e1000", ["cdev", "compat"], Metric::Attach);
    assert!(
        attach.sentence.starts_with(
            "e1000: compat takes 6.2 % more time to open, bind and attach than cdev (95 % interval 5."
        ),
        "{}",
        attach.sentence
    );
    let same = pair(&comparison, "e1000e", ["container", "compat"], Metric::ForwardPps);
    assert_eq!(same.verdict, Verdict::NoDifference);
    let noise = format!("at this noise (A/A ±{} %)", crate::words::percent(same.noise.unwrap()));
    assert_eq!(
        same.sentence,
        format!("e1000e: no difference in forwarding rate seen between container and compat {noise}")
    );
}

/// Two modes, `b` faster by `gain`, in six pairs without jitter; the A/A ratios are `1 ± noise`.
fn exact(gain: f64, noise: f64, pairs: u32) -> Verdict {
    let mut boot = recording(&["container", "cdev"], pairs);
    boot.runs.retain(|r| r.nic == "e1000");
    for (i, run) in boot.runs.iter_mut().enumerate() {
        run.forward_pps = match (run.pair.as_str(), run.mode.as_str()) {
            (Run::NOISE, _) => 1e5 * if i % 4 == 1 { 1.0 + noise } else { 1.0 },
            (_, "cdev") => 1e5 * (1.0 + gain),
            _ => 1e5,
        };
    }
    let comparison = Comparison::of(&[boot]);
    pair(&comparison, "e1000", ["container", "cdev"], Metric::ForwardPps).verdict
}

#[test]
fn a_difference_counts_only_outside_of_interval_and_noise() {
    assert_eq!(exact(0.02, 0.01, 6), Verdict::Differs);
    assert_eq!(exact(-0.02, 0.01, 6), Verdict::Differs);
    assert_eq!(exact(0.02, 0.03, 6), Verdict::NoDifference);
    assert_eq!(exact(0.0, 0.0, 6), Verdict::NoDifference);
    // Three rounds of A B B A are six pairs, but three A/A rounds are three; two rounds are four.
    assert_eq!(exact(0.02, 0.01, 3), Verdict::NoNoiseFloor);
    assert_eq!(exact(0.02, 0.01, 2), Verdict::TooFewPairs);
}

#[test]
fn drift_cancels_in_a_b_b_a_and_in_its_noise_floor() {
    let mut boot = recording(&["container", "cdev"], 8);
    boot.runs.retain(|r| r.nic == "e1000");
    for (i, run) in boot.runs.iter_mut().enumerate() {
        run.forward_pps = 1e5 * 1.01f64.powi(i as i32);
    }
    let comparison = Comparison::of(&[boot]);
    let p = pair(&comparison, "e1000", ["container", "cdev"], Metric::ForwardPps);
    assert_eq!(p.verdict, Verdict::NoDifference, "{p:?}");
    assert!((p.ratio.median - 1.0).abs() < 1e-3 && (p.noise.unwrap() - 0.01).abs() < 1e-3, "{p:?}");
}

#[test]
fn modes_of_different_boots_get_no_verdict() {
    let comparison = Comparison::of(&boots());
    let p = pair(&comparison, "e1000", ["container", "noiommu"], Metric::ForwardPps);
    assert_eq!((p.verdict, p.pairs, p.noise, p.boots), (Verdict::NotInterleaved, 0, None, [1, 2]));
    assert!(p.sentence.contains("not interleaved with container, so this is no verdict"), "{}", p.sentence);
    let said = crate::table::text(&comparison, false);
    assert!(said.contains("noiommu ran in another boot, so this is no verdict"), "{said}");
}

#[test]
fn a_mode_that_ran_in_two_boots_is_told_apart_and_compared_within_each() {
    let comparison =
        Comparison::of(&[recording(&["container", "cdev"], 8), recording(&["cdev", "compat"], 8)]);
    let labels: Vec<_> = comparison.rows[..4].iter().map(|r| &*r.label).collect();
    assert_eq!(labels, ["container", "cdev (boot 1)", "cdev (boot 2)", "compat"]);
    let modes: Vec<_> = (comparison.pairs.iter())
        .filter(|p| p.nic == "e1000" && p.metric == Metric::ForwardPps)
        .map(|p| (&*p.baseline, &*p.mode, p.verdict == Verdict::NotInterleaved))
        .collect();
    let expected = [
        ("container", "cdev (boot 1)", false),
        ("container", "compat", true),
        ("cdev (boot 2)", "compat", false),
    ];
    assert_eq!(modes, expected);
}

#[test]
fn unequal_sums_are_marked_said_and_fail_the_command() {
    let mut boot = recording(&["container", "cdev"], 6);
    boot.runs[0].received -= 3;
    let comparison = Comparison::of(std::slice::from_ref(&boot));
    assert!(!comparison.rows[0].balanced && comparison.rows[1].balanced);
    assert_eq!(comparison.problems.len(), 1);
    assert!(comparison.problems[0].ends_with(": 3 unaccounted for"), "{:?}", comparison.problems);
    let said = crate::table::text(&comparison, false);
    assert!(said.contains("container !") && said.contains("PACKETS DO NOT ADD UP"), "{said}");
    assert!(crate::html::page(&comparison).unwrap().contains("class=\"group bad\""));

    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("in.json");
    fs::write(&input, serde_json::to_string(&boot).unwrap()).unwrap();
    let error = report(&[input.to_str().unwrap()]).unwrap_err();
    assert_eq!(error.kind(), vireo_eal::ErrorKind::Protocol);
    assert!(
        error.to_string().starts_with("packets do not add up in 1 run(s): virtio-net, container"),
        "{error}"
    );
    boot.runs[0].received += 3;
    boot.runs[1].drops.insert("invented".into(), 1);
    assert!(Comparison::of(&[boot]).problems[0].ends_with(": 1 too many"));
}

#[test]
fn every_line_fits_and_no_cell_is_lost() {
    let comparison = Comparison::of(&boots());
    for lines in [false, true] {
        let said = crate::table::text(&comparison, lines);
        assert!(said.lines().all(|line| line.chars().count() <= 100), "{said}");
        assert!(!said.contains('\u{1b}') && said.contains('─') == lines, "{said}");
        for word in ["kpps", "p99.9", "noiommu-cdev", "map-file", "rx_missed 34", "6.12.57"] {
            assert!(said.contains(word), "{word} in {said}");
        }
    }
}

#[test]
fn the_page_is_whole_and_needs_nothing_else() {
    let comparison = Comparison::of(&boots());
    let page = crate::html::page(&comparison).unwrap();
    for tag in [
        "html", "head", "body", "main", "style", "table", "tr", "td", "th", "svg", "figure", "p", "pre", "dl",
    ] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    for row in &comparison.rows {
        assert!(page.contains(&format!("<td>{}</td>", crate::words::thousands(row.sent))), "{row:?}");
    }
    assert_eq!(page.matches("<svg ").count(), 6);
    assert!(page.contains("--html &lt;compare&gt;.html") && !page.contains("<compare>"));
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!outside.contains("http") && !outside.contains("url(") && !outside.contains("<script"));
}

#[test]
fn json_has_the_promised_keys_and_files_are_replaced_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let inputs = [path("a.json"), path("b.json")];
    for (input, boot) in inputs.iter().zip(boots()) {
        fs::write(input, serde_json::to_string(&boot).unwrap()).unwrap();
    }
    let (json, html) = (path("compare.json"), path("compare.html"));
    fs::write(&json, "old").unwrap();
    report(&[&inputs[0], &inputs[1], "--json", &json, "--html", &html]).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
    let value: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(value["environment"].as_array().unwrap().len(), 2);
    for key in ["rows", "pairs", "maps", "noise_floor"] {
        assert!(!value[key].as_array().unwrap().is_empty(), "{key}");
    }
    for row in value["rows"].as_array().unwrap() {
        for key in ["p50", "p99", "p999", "max"] {
            assert!(row["latency_ns"][key].as_u64().unwrap() > 0);
        }
        let times = ["forward_pps", "attach_ms", "map_ms_per_gib", "unmap_ms_per_gib", "first_packet_ms"];
        assert!(times.iter().all(|key| row[key].is_f64()) && row["map_ioctls"].is_u64());
        let count = |key: &str| row[key].as_u64().unwrap();
        assert!(count("received") > 0 && count("sent") == count("received") + count("dropped"));
    }
}

#[test]
fn a_bad_recording_is_named_with_the_place() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("bad.json");
    let said = |text: &str| {
        fs::write(&input, text).unwrap();
        report(&[input.to_str().unwrap()]).unwrap_err().to_string()
    };
    let error = said("{\"environment\": {},\n \"runs\": 7}");
    assert!(error.contains("bad.json: ") && error.ends_with("at line 2 column 11"), "{error}");
    assert!(said("").contains("EOF") && !said("[").contains('\n'));
    assert!(said("{\"environment\": {}, \"runs\": []}").starts_with("nothing to report"));
    fs::remove_file(&input).unwrap();
    assert!(report(&[input.to_str().unwrap()]).unwrap_err().to_string().contains("ENOENT"));
}

#[test]
fn the_environment_keeps_its_order() {
    let text = r#"{"zeta":"1","alpha":"2"}"#;
    let environment: Environment = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&environment).unwrap(), text);
}

fn report(words: &[&str]) -> vireo_eal::Result<()> {
    let command = ReportArgs::augment_args(clap::Command::new("report").no_binary_name(true));
    let args = ReportArgs::from_arg_matches(&command.get_matches_from(words)).unwrap();
    report_to(&args, &mut Vec::new(), false)
}
