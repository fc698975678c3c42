"""The loader on real mp4 files with sound, the splits and batches, and the synthetic talkers' truth."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
from data import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, TalkingHeads, get_ffmpeg_exe

REAL_FACES = Path(__file__).resolve().parents[2] / 'shared' / 'real_faces'
torch.set_num_threads(1)


def ffmpeg(*arguments):
    subprocess.run([get_ffmpeg_exe(), '-v', 'error', '-y', *map(str, arguments)], check=True)


def flash_and_click(num_frames=40, at=17, size=32):
    """A dark video that is white in one frame, and silence with one click in the middle of that frame."""
    frames, audio = np.zeros((num_frames, 3, size, size), np.uint8), np.zeros(num_frames * SAMPLES_PER_FRAME, np.int16)
    frames[at] = 255
    audio[at * SAMPLES_PER_FRAME + 300:at * SAMPLES_PER_FRAME + 340] = 20000
    return frames, audio


def write_clip(path, num_frames=16, level=100, size=32):
    tone = 8000 * np.sin(np.arange(num_frames * SAMPLES_PER_FRAME) / 5)
    data.write_video(path, np.full((num_frames, 3, size, size), level, np.uint8), tone.astype(np.int16))


@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    root = tmp_path_factory.mktemp('made') / 'people'
    data.make_synthetic(root, num_public=3, num_clients=2, num_unseen=1, clips_per_client=3, seed=3)
    return TalkingHeads(root)


# ---- sound

@pytest.mark.parametrize('second', [0.0, 0.3999, 0.4, 0.7777, 1.1999])
def test_an_impulse_lands_in_the_frame_of_its_second(second):
    audio = np.zeros(30 * SAMPLES_PER_FRAME, np.int16)
    sample = int(second * SAMPLE_RATE)
    audio[sample] = 30000
    mel = data.log_mel(audio)
    assert mel.shape == (120, 40)
    assert mel.sum(1).argmax() == sample // 160 and mel.sum(1).argmax() // 4 == int(FPS * second)
    windows, frame = data.audio_windows(mel, 5), int(FPS * second)
    assert windows.shape == (30, 20, 40)
    np.testing.assert_array_equal(windows[frame, 8:12], mel[4 * frame:4 * frame + 4])        # its own four, in the middle


def test_windows_are_padded_with_silence_and_refuse_an_even_width():
    mel = data.log_mel(np.zeros(6 * SAMPLES_PER_FRAME, np.int16))
    np.testing.assert_allclose(data.audio_windows(mel, 3), data.SILENCE, rtol=1e-6)
    with pytest.raises(ValueError, match='odd'):
        data.audio_windows(mel, 4)


def test_flash_and_click_share_a_frame_through_a_real_file(tmp_path):
    data.write_video(tmp_path / 'anna' / '1.mp4', *flash_and_click())
    clip = TalkingHeads(tmp_path, size=32).clips[0]
    assert len(clip.frames) == 40 and len(clip.audio) == 40 * SAMPLES_PER_FRAME and len(clip.mel) == 160
    assert clip.frames.mean((1, 2, 3)).argmax() == 17
    assert np.abs(clip.audio).argmax() // SAMPLES_PER_FRAME == 17 and clip.mel.sum(1).argmax() // 4 == 17


def test_a_video_written_in_blocks_is_the_same_and_a_failing_writer_leaves_nothing(tmp_path):
    frames, audio = flash_and_click()
    data.write_video(tmp_path / 'whole.mp4', frames, audio)
    data.write_video(tmp_path / 'blocks.mp4', iter([frames[:7], frames[7:]]), audio)
    assert (tmp_path / 'whole.mp4').read_bytes() == (tmp_path / 'blocks.mp4').read_bytes()

    def fails():
        yield frames
        raise ValueError('no more')

    with pytest.raises(ValueError, match='no more'):
        data.write_video(tmp_path / 'half.mp4', fails(), audio)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['blocks.mp4', 'whole.mp4']


@pytest.mark.parametrize('late', [0, 1600])
def test_the_lag_of_a_sound_is_found(tmp_path, late):
    frames, audio = flash_and_click()
    data.write_video(tmp_path / 'a.mp4', frames, np.roll(audio, late))
    assert data.sound_lag(tmp_path / 'a.mp4', audio) == pytest.approx(late / SAMPLE_RATE, abs=0.005)


def test_other_rates_and_sizes_are_resampled(tmp_path):
    """30 fps, 50x38 pixels, 44.1 kHz stereo: one second in, the picture turns white and a tone starts."""
    (tmp_path / 'anna').mkdir()
    ffmpeg('-f', 'lavfi', '-i', "color=black:s=50x38:r=30:d=2,drawbox=c=white:t=fill:enable='gte(t,1)'",
           '-f', 'lavfi', '-i', 'aevalsrc=0.5*sin(2*PI*1000*t)*gte(t\\,1)|0.5*sin(2*PI*1000*t)*gte(t\\,1):s=44100:d=2',
           '-pix_fmt', 'yuv420p', '-c:a', 'aac', tmp_path / 'anna' / '1.mp4')
    clip = TalkingHeads(tmp_path, size=24).clips[0]
    assert clip.frames.shape == (50, 3, 24, 24) and len(clip.audio) == 50 * SAMPLES_PER_FRAME
    assert np.flatnonzero(clip.frames.mean((1, 2, 3)) > 128)[0] == 25
    assert abs(np.flatnonzero(np.abs(clip.audio.astype(int)) > 3000)[0] - SAMPLE_RATE) < SAMPLES_PER_FRAME / 2
    spectrum = np.abs(np.fft.rfft(clip.audio[20000:30000].astype(float)))
    assert abs(spectrum.argmax() * SAMPLE_RATE / 10000 - 1000) < 3


def test_speech_of_any_format_and_none(tmp_path):
    ffmpeg('-f', 'lavfi', '-i', 'sine=f=500:r=44100:d=1', '-ac', 2, tmp_path / 'a.wav')
    assert abs(len(data.load_speech(tmp_path / 'a.wav')) - SAMPLE_RATE) < 20
    (tmp_path / 'empty.wav').write_bytes((tmp_path / 'a.wav').read_bytes()[:78])
    (tmp_path / 'text.wav').write_text('hello')
    for name, reason in (('empty.wav', 'empty.wav'), ('text.wav', 'no sound could be read'), ('none.wav', 'no such')):
        with pytest.raises(ValueError, match=reason):
            data.load_speech(tmp_path / name)


# ---- files

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'RGB', '1', 'I;16'])
def test_images_of_any_mode(tmp_path, mode):
    grey = np.full((30, 50), 200, np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == 'I;16' else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / 'a.png')
    picture, cropped = data.load_image(tmp_path / 'a.png', 16)
    assert cropped
    assert picture.shape == (3, 16, 16) and picture.dtype == np.uint8
    if mode != '1':
        assert np.abs(picture.astype(int) - 200).max() <= 3


def test_crop_keeps_the_middle_of_clips_and_pictures_alike(tmp_path):
    """Red in the middle 32 of 64 pixels, blue around: half of each side is all red."""
    frames, audio = np.zeros((12, 64, 64, 3), np.uint8), np.zeros(12 * SAMPLES_PER_FRAME, np.int16)
    frames[..., 2], frames[:, 16:48, 16:48] = 255, (255, 0, 0)
    data.write_video(tmp_path / 'anna' / '1.mp4', frames, audio, crf=1)
    Image.fromarray(frames[0]).resize((96, 96), Image.Resampling.NEAREST).save(tmp_path / 'a.png')
    for crop, blue in ((1.0, 192), (0.5, 0)):
        picture, _ = data.load_image(tmp_path / 'a.png', 16, crop)
        for shown in (picture, TalkingHeads(tmp_path, size=16, crop=crop).clips[0].frames[5]):
            assert abs(int((shown[2] > shown[0]).sum()) - blue) <= 4 and shown.shape == (3, 16, 16)


def test_no_image_is_named(tmp_path):
    (tmp_path / 'a.png').write_text('no picture')
    with pytest.raises(ValueError, match='a.png'):
        data.load_image(tmp_path / 'a.png', 16)
    with pytest.raises(ValueError, match='b.png'):
        data.load_image(tmp_path / 'b.png', 16)


def test_bad_clips_are_skipped_with_their_reason(tmp_path):
    folder = tmp_path / 'anna'
    write_clip(folder / 'good.mp4')
    write_clip(folder / 'short.mp4', num_frames=2)
    data.write_video(folder / 'mute.mp4', np.zeros((16, 3, 32, 32), np.uint8))
    (folder / 'text.mp4').write_text('I am not a video.\n')
    (folder / 'empty.mp4').touch()
    noise = np.random.default_rng(0).integers(0, 255, (40, 3, 32, 32), dtype=np.uint8)
    data.write_video(folder / 'cut.mp4', noise, np.zeros(40 * SAMPLES_PER_FRAME, np.int16))
    (folder / 'cut.mp4').write_bytes((folder / 'cut.mp4').read_bytes()[:20000])              # its index comes first
    ffmpeg('-i', folder / 'good.mp4', '-c', 'copy', folder / 'late.mp4')                      # its index comes last
    (folder / 'late.mp4').write_bytes((folder / 'late.mp4').read_bytes()[:-300])
    heads = TalkingHeads(tmp_path, size=32)
    reasons = {path.name: reason for path, reason in heads.skipped}
    assert [clip.name for clip in heads.clips] == ['good']
    assert sorted(reasons) == ['cut.mp4', 'empty.mp4', 'late.mp4', 'mute.mp4', 'short.mp4', 'text.mp4']
    assert '2 frames' in reasons['short.mp4'] and reasons['mute.mp4'] == 'no sound'
    assert all(reason and '\n' not in reason for reason in reasons.values())
    (folder / 'good.mp4').unlink()
    with pytest.raises(ValueError, match='no usable clip.*6 of 6'):
        TalkingHeads(tmp_path, size=32)


def test_a_missing_dataset_names_its_neighbour(tmp_path):
    (tmp_path / 'synthetic').mkdir()
    with pytest.raises(ValueError, match='no dataset at .*sinthetic; did you mean .*synthetic'):
        TalkingHeads(tmp_path / 'sinthetic')


def test_a_file_is_decoded_once_until_it_changes(tmp_path, monkeypatch):
    decoded, decode = [], data._decode
    monkeypatch.setattr(data, '_decode', lambda path, *how: decoded.append(path.name) or decode(path, *how))
    write_clip(tmp_path / 'anna' / '1.mp4', level=50)
    write_clip(tmp_path / 'anna' / '2.mp4', level=50)
    TalkingHeads(tmp_path, size=32)
    first = TalkingHeads(tmp_path, size=32)
    assert sorted(decoded) == ['1.mp4', '2.mp4'] and abs(first.clips[1].frames.mean() - 50) < 4
    write_clip(tmp_path / 'anna' / '2.mp4', level=200)
    second = TalkingHeads(tmp_path, size=32)
    assert decoded[2:] == ['2.mp4'] and abs(second.clips[1].frames.mean() - 200) < 4
    assert len(list((tmp_path / '.cache').iterdir())) == 2                                    # the stale one is gone
    assert len(TalkingHeads(tmp_path, size=32, max_frames=12).clips[0].mel) == 48 and len(decoded) == 3


def test_lrs3_nesting_and_hdtf_names(tmp_path):
    write_clip(tmp_path / 'one.mp4')
    for place in ('lrs3/pretrain/id1/00001', 'lrs3/test/id1/00001', 'lrs3/trainval/id2/50001', 'hdtf/RD_Radio1_000',
                  'hdtf/RD_Radio1_001', 'hdtf/WDA_Someone0_000'):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / 'one.mp4', tmp_path / f'{place}.mp4')
    lrs3 = TalkingHeads(tmp_path / 'lrs3', size=16).people
    assert {p: [c.name for c in clips] for p, clips in lrs3.items()} == {
        'id1': ['pretrain-00001', 'test-00001'], 'id2': ['trainval-50001']}
    hdtf = TalkingHeads(tmp_path / 'hdtf', size=16).people
    assert {p: len(clips) for p, clips in hdtf.items()} == {'RD_Radio1': 2, 'WDA_Someone0': 1}
    assert hdtf['RD_Radio1'][0].prompt == '' and hdtf['RD_Radio1'][0].opening is None


# ---- splits and batches

def test_people_are_disjoint_and_keep_their_roles():
    names = [f'speaker{i}' for i in range(20)]
    public, clients, unseen = data.split_people(names, 6, 4, seed=1)
    assert (len(clients), len(unseen)) == (6, 4) and sorted(public + clients + unseen) == sorted(names)
    assert data.split_people(names[::-1], 6, 4, seed=1) == (public, clients, unseen) != data.split_people(names, 6, 4, 2)
    roles = ['public-0', 'public-1', 'client-0', 'client-1', 'client-2', 'unseen-0']
    assert data.split_people(roles, 2, 1, 0) == (['public-0', 'public-1'], ['client-0', 'client-1'], ['unseen-0'])
    for few in (['anna'], roles):
        with pytest.raises(ValueError, match='cannot be split'):
            data.split_people(few, 4, 1, 0)


def clip_of(person, name, num_frames=30):
    """A clip whose every pixel tells its name and whose brightness falls with time."""
    frames = np.zeros((num_frames, 3, 8, 8), np.uint8)
    frames[:, 0], frames[:, 1] = int(name), np.arange(num_frames)[:, None, None]
    mel = np.repeat(np.arange(4 * num_frames, dtype=np.float32)[:, None], 40, 1)
    return data.Clip(person, name, Path(person, name), frames, np.zeros(num_frames * 640, np.int16), mel, '', None)


def test_clips_are_split_per_person():
    clips = [clip_of(p, str(i)) for p in 'ab' for i in range(10)] + [clip_of('c', str(i)) for i in range(3)]
    parts = data.split_clips(clips, seed=0)
    assert sorted(id(c) for part in parts.values() for c in part) == sorted(id(c) for c in clips)
    count = lambda part: [sum(c.person == p for c in parts[part]) for p in 'abc']
    assert (count('train'), count('validation'), count('test')) == ([6, 6, 1], [2, 2, 1], [2, 2, 1])
    alone = data.split_clips([c for c in clips if c.person == 'b'], seed=0)
    assert alone['test'] == [c for c in parts['test'] if c.person == 'b']
    with pytest.raises(ValueError, match='dora has 2'):
        data.split_clips([clip_of('dora', '1'), clip_of('dora', '2')], 0)


def test_pieces_of_a_clip_stay_aligned():
    clip = clip_of('a', '1')                                                              # of 30 frames
    pieces = data.cut([clip], 0.48)
    assert [len(p.frames) for p in pieces] == [12, 12, 6] and len({p.path for p in pieces}) == 3
    for number, piece in enumerate(pieces):
        start = 12 * number
        assert np.array_equal(piece.frames, clip.frames[start:start + 12]) and len(piece.audio) == 640 * len(piece.frames)
        assert np.array_equal(piece.mel, clip.mel[4 * start:4 * start + 48])
    assert [len(p.frames) for p in data.cut([clip], 2.0)] == [30] and [len(p.frames) for p in data.cut([clip], 1.0)] == [25]


def test_a_batch_is_aligned_and_its_reference_is_outside_of_the_window():
    clips = [clip_of('a', str(i)) for i in range(3)] + [clip_of('b', '7')]
    level = lambda t: ((t + 1) * 127.5).round()
    number = {clip.path: k for k, clip in enumerate(clips)}
    views = {clip.path: [data.View(clip.frames[moment], moment,
                                   1000 * moment + 100 * number[clip.path] + torch.arange(30.)[:, None, None, None],
                                   torch.full((1, 1, 1), float(moment)), '', '') for moment in (5, 15)] for clip in clips}
    batch = data.draw_batch(clips, views, 64, 8, torch.Generator().manual_seed(0))
    assert batch['frames'].shape == (64, 8, 3, 8, 8) and batch['mel'].shape == (64, 8, 20, 40)
    assert batch['opening'].isnan().all() and set(batch['person']) == {'a', 'b'}
    name, time = level(batch['frames'][:, 0, 0, 0, 0]), level(batch['frames'][:, :, 1, 0, 0])
    torch.testing.assert_close(batch['mel'][:, :, 8, 0], 4 * time)                            # frame i hears mel 4 i
    moment = level(batch['reference'][:, 1, 0, 0])
    assert torch.equal(level(batch['reference'][:, 0, 0, 0]), name)                           # of the same clip
    assert set(moment.tolist()) == {5, 15} and ((moment[:, None] != time).all(1)).all()
    assert (time[:, 0] < 5).any() and (time[:, 0] > 15).any()
    torch.testing.assert_close(batch['reference_latents'].flatten(), moment)                  # all of the same moment
    torch.testing.assert_close((batch['motion'].flatten(1) - 1000 * moment[:, None]) % 100, time)
    again = data.draw_batch(clips, views, 64, 8, torch.Generator().manual_seed(0))
    assert all(torch.equal(batch[k], again[k]) for k in ('frames', 'mel', 'reference', 'motion'))
    with pytest.raises(ValueError, match='31 frames'):
        data.draw_batch(clips, views, 2, 31, torch.Generator())


# ---- synthetic talkers

def test_the_truth_is_heard_and_seen(synthetic):
    """Opening follows the loudness of the sound and the dark area of the decoded mouth; other speech tells nothing."""
    heard, seen, other, widest = [], [], [], []
    for clip, next_clip in zip(synthetic.clips, synthetic.clips[1:] + synthetic.clips[:1]):
        loudness = lambda c: c.mel.reshape(len(c.frames), 4, 40)[:, :, :25].mean((1, 2))
        red, green, _ = clip.frames[:, :, 32:62, 16:48].astype(int).transpose(1, 0, 2, 3)
        dark = ((green < 32) & (red > 1.5 * green)).mean((1, 2))                              # not hair, nor skin
        heard.append(np.corrcoef(loudness(clip), clip.opening)[0, 1])
        other.append(np.corrcoef(loudness(next_clip), clip.opening)[0, 1])
        seen.append(np.corrcoef(dark, clip.opening)[0, 1])
        widest.append(clip.opening.max())
        assert 0 <= clip.opening.min() < .1 and clip.opening.max() <= 1
    assert np.mean(heard) > .7 and np.mean(seen) > .6 and abs(np.mean(other)) < .3


def test_the_same_seed_makes_the_same_frames(tmp_path, synthetic):
    data.make_synthetic(tmp_path / 'again', num_public=1, num_clients=0, num_unseen=0, seed=3)
    data.make_synthetic(tmp_path / 'other', num_public=1, num_clients=0, num_unseen=0, seed=4)
    again, other = TalkingHeads(tmp_path / 'again').clips[0], TalkingHeads(tmp_path / 'other').clips[0]
    assert np.array_equal(again.frames, synthetic.people['public-000'][0].frames)
    assert not np.array_equal(again.frames, other.frames)


def test_unreliable_clients_are_marked(tmp_path):
    data.make_synthetic(tmp_path / 'd', num_public=0, num_clients=4, num_unseen=0, clips_per_client=1, seconds=.5,
                        size=32, unreliable=.5)
    assert sum('Fault:' in path.read_text() for path in (tmp_path / 'd').rglob('*.txt')) == 2
    with pytest.raises(ValueError, match='exists already'):
        data.make_synthetic(tmp_path / 'd')


def test_clips_are_spoiled_as_unreliable_clients_are(synthetic):
    faults = data.choose_faults(['a', 'b', 'c', 'd', 'e', 'f'], .5, 0)
    assert sorted(faults.values()) == ['flicker', 'noise', 'shifted sound']
    assert faults.items() <= data.choose_faults(['a', 'b', 'c', 'd', 'e', 'f'], 1, 0).items()
    clip = synthetic.people['client-000'][0]
    late, dark, noisy = (data.spoil(clip, fault, 0) for fault in ('shifted sound', 'flicker', 'noise'))
    assert np.array_equal(late.frames, clip.frames) and not np.array_equal(late.mel, clip.mel)
    assert np.array_equal(np.sort(late.audio), np.sort(clip.audio))
    assert (dark.frames <= clip.frames).all() and np.array_equal(dark.audio, clip.audio)
    assert 20 < np.std(noisy.frames.astype(int) - clip.frames) < 30
    assert np.array_equal(noisy.frames, data.spoil(clip, 'noise', 0).frames)


def test_first_seconds_cuts_the_last_clip(synthetic):
    clips = synthetic.people['client-000']
    kept = data.first_seconds(clips, 3.0)
    assert [len(c.frames) for c in kept] == [50, 25] and [c.path for c in kept] == [c.path for c in clips[:2]]
    assert (len(kept[1].audio), len(kept[1].mel), len(kept[1].opening)) == (25 * SAMPLES_PER_FRAME, 100, 25)
    assert [len(c.frames) for c in data.first_seconds(clips, 2.2)] == [50]
    with pytest.raises(ValueError, match='has 6 s of video'):
        data.first_seconds(clips, 7.0)


# ---- command line

def test_command_line(tmp_path, synthetic, capsys):
    assert not data.main(['--check', str(synthetic.root)])
    assert '6 people' in capsys.readouterr().out
    assert not data.main(['--look', str(synthetic.root), str(tmp_path / 'look.png')])
    assert Image.open(tmp_path / 'look.png').width == 960
    assert data.main(['--check', str(tmp_path / 'nowhere')]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith('data.py: no dataset at')


@pytest.mark.skipif(not REAL_FACES.is_dir(), reason='../shared/real_faces is not there')
def test_real_faces_load(tmp_path):
    for person in sorted(p for p in REAL_FACES.iterdir() if p.is_dir())[:6]:
        (tmp_path / person.name).symlink_to(person.resolve())
    heads = TalkingHeads(tmp_path, cache=tmp_path / '.cache')
    assert len(heads.people) == 6 and len(heads.clips) >= 12 and heads.skipped == []
    assert all(c.frames.std() > 10 and np.abs(c.audio).max() > .01 for c in heads.clips)     # a picture, and a voice
