use proptest::prelude::*;

use super::*;

fn sampler(change: impl FnOnce(&mut SamplerConfig)) -> Sampler {
    let mut config = SamplerConfig { temp: 1.0, top_k: 0, top_p: 1.0, ..SamplerConfig::default() };
    change(&mut config);
    Sampler::new(config).unwrap()
}

/// How often each id comes out of `n` draws.
fn counts(sampler: &mut Sampler, logits: &[f32], n: usize) -> Vec<usize> {
    let mut counts = vec![0; logits.len()];
    for _ in 0..n {
        counts[sampler.sample(logits, &[]).unwrap() as usize] += 1;
    }
    counts
}

// Guards: each way of asking for greedy takes the largest logit, the first one of equals.
#[test]
fn greedy() {
    let check = |change: fn(&mut SamplerConfig)| {
        assert_eq!(sampler(change).sample(&[1.0, 3.0, 3.0, -1.0], &[]).unwrap(), 1);
    };
    check(|config| config.greedy = true);
    check(|config| config.temp = 0.0);
    check(|config| config.top_k = 1);
    check(|config| config.top_p = 1e-9);
}

// Guards: the largest logit is found wherever it stands, and the first of several, at lengths around the lanes and the chunks too; so is one
// that is no number.
#[test]
fn largest_anywhere() {
    let mut greedy = sampler(|config| config.greedy = true);
    for len in [1, 15, 16, 17, 31, 32, 33, 100, 511, 512, 513, 1025] {
        for at in 0..len {
            let mut logits = vec![-1.0; len];
            logits[at] = 2.0;
            assert_eq!(greedy.sample(&logits, &[]), Ok(at as u32));
            logits[len - 1] = 2.0;
            assert_eq!(greedy.sample(&logits, &[]), Ok(at as u32));
            logits[at] = f32::INFINITY;
            assert_eq!(greedy.sample(&logits, &[]), Err(SamplerError::NonFinite { index: at, value: f32::INFINITY }));
        }
    }
}

// Guards: what no config may say is refused from Rust too, with its key, and leaves a sampler as it was.
#[test]
fn refused_settings() {
    let check = |key: &str, change: fn(&mut SamplerConfig)| {
        let mut config = SamplerConfig::default();
        change(&mut config);
        let mut used = sampler(|_| {});
        let before = used.config().clone();
        for refused in [Sampler::new(config.clone()).err(), used.apply(config).err()] {
            let refused = refused.unwrap().to_string();
            assert!(refused.starts_with(&format!("/sampler/{key}: ")), "{refused}");
        }
        assert_eq!(used.config(), &before);
    };
    check("temp", |config| config.temp = f32::NAN);
    check("temp", |config| config.temp = -1.0);
    check("top-p", |config| config.top_p = 0.0);
    check("min-p", |config| config.min_p = 1.5);
    check("token-penalty/repetition-penalty", |config| config.penalty.repetition = -1.0);
    check("token-penalty/presence-penalty", |config| config.penalty.presence = f32::NAN);
    check("token-penalty/frequency-penalty", |config| config.penalty.frequency = 101.0);
}

// Guards: NaN and plus infinity are errors that say where, minus infinity rules a token out.
#[test]
fn odd_logits() {
    for greedy in [true, false] {
        let mut sampler = sampler(|config| config.greedy = greedy);
        let nan = sampler.sample(&[0.0, f32::NAN, 1.0], &[]);
        assert!(matches!(nan, Err(SamplerError::NonFinite { index: 1, .. })));
        let infinite = sampler.sample(&[0.0, 1.0, f32::INFINITY], &[]);
        assert_eq!(infinite, Err(SamplerError::NonFinite { index: 2, value: f32::INFINITY }));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -1e30, f32::NEG_INFINITY], &[]), Ok(1));
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY; 3], &[]), Err(SamplerError::AllRuledOut { len: 3 }));
        assert_eq!(sampler.sample(&[], &[]), Err(SamplerError::AllRuledOut { len: 0 }));
    }
}

// Guards: tokens come as often as the softmax says, after each of the stages.
#[test]
fn draws_follow_the_softmax() {
    let logits = [1.0_f32, 0.0, 2.0, -1.0, 0.5];
    let check = |mut sampler: Sampler, kept: &[usize], temp: f64| {
        let weight = |id: usize| if kept.contains(&id) { (f64::from(logits[id]) / temp).exp() } else { 0.0 };
        let total: f64 = (0..logits.len()).map(weight).sum();
        for (id, count) in counts(&mut sampler, &logits, 20_000).into_iter().enumerate() {
            let want = weight(id) / total;
            assert!((count as f64 / 20_000.0 - want).abs() < 0.02, "{id}: {count} of 20000, need {want}");
            assert_eq!(count == 0, want == 0.0, "{id}");
        }
    };
    check(sampler(|_| {}), &[0, 1, 2, 3, 4], 1.0);
    check(sampler(|config| config.temp = 2.0), &[0, 1, 2, 3, 4], 2.0);
    check(sampler(|config| config.top_k = 2), &[0, 2], 1.0);
    check(sampler(|config| config.top_p = 0.7), &[0, 2], 1.0);
    check(sampler(|config| config.min_p = 0.2), &[0, 2, 4], 1.0);
    check(sampler(|config| (config.top_k, config.min_p) = (4, 0.2)), &[0, 2, 4], 1.0);
    check(sampler(|config| (config.top_k, config.min_p) = (2, 0.2)), &[0, 2], 1.0);
}

// Guards: a sampler's first tokens for a seed, over the whole path, stay what they are today; its random numbers go on where a
// config is applied with the same seed, and begin anew with another one.
#[test]
fn tokens_of_a_seed_are_pinned() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 / 100.0).collect();
    let mut sampler = Sampler::new(SamplerConfig::default()).unwrap();
    let first: Vec<u32> = (0..8).map(|_| sampler.sample(&logits, &[]).unwrap()).collect();
    assert_eq!(first, PINNED);
    sampler.reset();
    let other =
        SamplerConfig { penalty: TokenPenalty { last_n: 3, ..sampler.config().penalty }, ..sampler.config().clone() };
    let mut again: Vec<u32> = (0..4).map(|_| sampler.sample(&logits, &[]).unwrap()).collect();
    sampler.apply(other.clone()).unwrap();
    again.extend((0..4).map(|_| sampler.sample(&logits, &[]).unwrap()));
    assert_eq!(again, PINNED);
    sampler.apply(SamplerConfig { seed: Some(0), ..other.clone() }).unwrap();
    sampler.apply(other).unwrap();
    assert_eq!(sampler.sample(&logits, &[]), Ok(PINNED[0]));
}

const PINNED: [u32; 8] = [630, 531, 198, 25, 309, 741, 284, 741];

// Guards: penalties lower exactly the tokens of the last n, by the stated formulas.
#[test]
fn penalties() {
    let check = |penalty: TokenPenalty, history: &[u32], want: [f32; 3]| {
        let mut logits = [2.0, -2.0, 1.0];
        let mut window = history[history.len().saturating_sub(penalty.last_n)..].to_vec();
        penalize(&penalty, &mut window, &mut logits);
        assert_eq!(logits, want, "{penalty:?} {history:?}");
    };
    let base = TokenPenalty { last_n: 10, repetition: 0.0, presence: 0.0, frequency: 0.0 };
    check(TokenPenalty { repetition: 2.0, ..base }, &[0, 1, 1], [1.0, -4.0, 1.0]);
    check(TokenPenalty { presence: 0.5, ..base }, &[0, 1, 1], [1.5, -2.5, 1.0]);
    check(TokenPenalty { frequency: 0.5, ..base }, &[0, 1, 1], [1.5, -3.0, 1.0]);
    check(TokenPenalty { presence: 0.5, last_n: 1, ..base }, &[0, 1, 1], [2.0, -2.5, 1.0]);
    check(TokenPenalty { presence: 0.5, ..base }, &[7], [2.0, -2.0, 1.0]);
    let greedy = |last_n: usize, history: &[u32]| {
        let mut greedy = sampler(|config| {
            config.greedy = true;
            config.penalty = TokenPenalty { presence: 5.0, last_n, ..base };
        });
        greedy.sample(&[2.0, -2.0, 1.0], history).unwrap()
    };
    assert_eq!([greedy(10, &[0]), greedy(10, &[]), greedy(0, &[0])], [2, 0, 0]);
    assert_eq!([greedy(2, &[0, 2]), greedy(1, &[0, 2]), greedy(1, &[2, 0])], [1, 0, 2]);
}

// Guards: our exponential is one: its values feed every draw.
#[test]
fn exponential() {
    for i in 0..100_000 {
        let x = -f64::from(i) * 0.007;
        assert!((exp(x) / x.exp() - 1.0).abs() < 1e-15 * (1.0 + x.abs()), "exp({x}) = {}", exp(x));
    }
    assert_eq!((exp(0.0), exp(-1e300), exp(f64::NEG_INFINITY)), (1.0, 0.0, 0.0));
}

proptest! {
    // Guards: the one-pass top-k is the k best of a full sort, ties and all.
    #[test]
    fn top_k_equals_a_sort(logits in prop::collection::vec((-4_i8..40).prop_map(f32::from), 1..400), k in 1_usize..40) {
        let mut kept = Vec::new();
        take_top_k(k, &logits, &mut kept);
        let mut sorted: Vec<u32> = (0..logits.len() as u32).collect();
        sorted.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        sorted.truncate(k);
        let ids: Vec<u32> = kept.iter().map(|candidate| candidate.id).collect();
        prop_assert_eq!(ids, sorted);
    }

    // Guards: top-p in portions keeps what a full sort keeps.
    #[test]
    fn top_p_equals_a_sort(weights in prop::collection::vec(1_u32..1000, 1..400), top_p in 0.01_f64..1.0) {
        let mut kept: Vec<Candidate> = weights.iter().enumerate()
            .map(|(id, &weight)| Candidate { weight: f64::from(weight), id: id as u32 }).collect();
        let mut sorted = kept.clone();
        sorted.sort_by(Candidate::order);
        let target = top_p * f64::from(weights.iter().sum::<u32>());
        let mut sum = 0.0;
        let need = sorted.iter().position(|candidate| { sum += candidate.weight; target <= sum }).unwrap() + 1;
        take_top_p(target, &mut kept);
        let ids = |list: &[Candidate]| list.iter().map(|candidate| candidate.id).collect::<Vec<_>>();
        prop_assert_eq!(ids(&kept), ids(&sorted[..need]));
    }

    // Guards: over the whole vocabulary, leaving out what weighs next to nothing leaves every draw as a full sort has it.
    #[test]
    fn whole_vocabulary_equals_a_sort(
        logits in prop::collection::vec(-12.0_f32..4.0, 1..300), top_p in 0.01_f32..=1.0, min_p in 0.0_f32..0.2, seed in 0_u64..1000,
    ) {
        let max = f64::from(largest(&logits));
        let mut sorted: Vec<Candidate> = logits.iter().enumerate()
            .map(|(id, &logit)| Candidate { weight: exp(f64::from(logit) - max), id: id as u32 }).collect();
        let total: f64 = sorted.iter().map(|candidate| candidate.weight).sum();
        if top_p < 1.0 {
            sorted.sort_by(Candidate::order);
            let mut sum = 0.0;
            let within = |candidate: &Candidate| { let before = sum; sum += candidate.weight; before < f64::from(top_p) * total };
            sorted = sorted.into_iter().take_while(within).collect();
        }
        sorted.retain(|candidate| f64::from(min_p) <= candidate.weight);
        let mut random = Random::new(Some(seed));
        let mut sampler = sampler(|config| *config = SamplerConfig { seed: Some(seed), top_p, min_p, ..config.clone() });
        for _ in 0..4 {
            prop_assert_eq!(sampler.sample(&logits, &[]), Ok(draw(&sorted, random.unit())));
        }
    }

    // Guards: whatever the settings and the logits, the token is one that is not ruled out.
    #[test]
    fn never_out_of_range(
        logits in prop::collection::vec(prop_oneof![-1e38_f32..1e38, -5.0_f32..5.0, Just(f32::NEG_INFINITY)], 1..60),
        history in prop::collection::vec(0_u32..80, 0..20),
        (temp, top_k, top_p, min_p) in (0.0_f32..100.0, 0_usize..70, 1e-6_f32..=1.0, 0.0_f32..=1.0),
        (repetition, presence) in (0.0_f32..100.0, -100.0_f32..100.0),
    ) {
        let penalty = TokenPenalty { last_n: 8, repetition, presence, frequency: presence };
        let mut sampler = sampler(|config| *config = SamplerConfig {
            seed: Some(1), greedy: false, temp, top_k, top_p, min_p, penalty });
        match sampler.sample(&logits, &history) {
            Ok(id) => prop_assert!(f32::NEG_INFINITY < logits[id as usize]),
            Err(_) => prop_assert!(logits.iter().all(|&logit| logit == f32::NEG_INFINITY)),
        }
    }
}
