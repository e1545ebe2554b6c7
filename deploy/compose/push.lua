-- Pushes each MR series to btray by STOW-RS, once nothing of it has arrived for StableAge seconds.
--
-- It is the series that has to be still, not the study: the report that btray sends back makes the study change, and a
-- rule for studies would push all of it again.
function OnStableSeries(seriesId, tags, metadata)
  if tags['Modality'] == 'MR' then
    RestApiPost('/dicom-web/servers/btray/stow', DumpJson({Resources = {seriesId}, Synchronous = false}, true))
  end
end
